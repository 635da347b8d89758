// The kernel for AVX-512 (F, BW, DQ, VL): vectors of 64 bytes. It keeps away from the instructions of AVX512_BF16.
#include <immintrin.h>

#include "kernels/generic.h"

namespace cofire {
namespace {

struct Avx512 {
  static constexpr size_t width = 16;
  static constexpr bool has_f16c = true;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t S __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint16_t H __attribute__((vector_size(32)));
  typedef uint8_t B __attribute__((vector_size(16)));

  // The forms with a mask, here of all lanes: GCC 12 warns that the others read what was never set.
  static constexpr uint16_t all = 0xffff;

  static H narrow16(U wide) { return bits_as<H>(_mm512_maskz_cvtepi32_epi16(all, bits_as<__m512i>(wide))); }
  static B narrow8(U wide) { return bits_as<B>(_mm512_maskz_cvtepi32_epi8(all, bits_as<__m512i>(wide))); }
  static F from_f16(H half) { return bits_as<F>(_mm512_maskz_cvtph_ps(all, bits_as<__m256i>(half))); }
  static H to_f16(F value) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return bits_as<H>(_mm512_maskz_cvtps_ph(all, bits_as<__m512>(value), nearest));
  }
};

}  // namespace

void reduce_avx512(const Task& task) { reduce_task<Avx512>(task); }

}  // namespace cofire
