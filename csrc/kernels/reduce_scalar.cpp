// The kernel for any processor: what the compiler makes of vectors of 16 bytes.
#include "kernels/generic.h"

namespace cofire {
namespace {

struct Portable {
  static constexpr bool has_f16c = false;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t S __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint16_t H __attribute__((vector_size(16)));
  typedef double D __attribute__((vector_size(16)));
  typedef int64_t L __attribute__((vector_size(16)));
  typedef uint64_t M __attribute__((vector_size(16)));
};

}  // namespace

void reduce_scalar(const Task& task) { reduce_task<Portable>(task); }

}  // namespace cofire
