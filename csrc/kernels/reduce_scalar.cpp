// The kernel for any processor: what the compiler makes of vectors of 16 bytes.
#include "kernels/generic.h"

namespace cofire {
namespace {

struct Portable {
  static constexpr size_t width = 4;
  static constexpr bool has_f16c = false;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t S __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint16_t H __attribute__((vector_size(8)));
  typedef uint8_t B __attribute__((vector_size(4)));

  static H narrow16(U wide) { return __builtin_convertvector(wide, H); }
  static B narrow8(U wide) { return __builtin_convertvector(wide, B); }
};

}  // namespace

void reduce_scalar(const Task& task) { reduce_task<Portable>(task); }

}  // namespace cofire
