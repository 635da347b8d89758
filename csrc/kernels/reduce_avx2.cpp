// The kernel for AVX2 and F16C: vectors of 32 bytes.
#include <immintrin.h>

#include "kernels/generic.h"

namespace cofire {
namespace {

struct Avx2 {
  static constexpr size_t width = 8;
  static constexpr bool has_f16c = true;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t S __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));
  typedef uint8_t B __attribute__((vector_size(8)));

  static H narrow16(U wide) {
    const auto packed = _mm256_packus_epi32(bits_as<__m256i>(wide), bits_as<__m256i>(wide));
    return bits_as<H>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
  static B narrow8(U wide) {
    const auto low_bytes = _mm256_set1_epi32(0x0c080400);  // Of each half: to its first four bytes.
    const auto packed = _mm256_shuffle_epi8(bits_as<__m256i>(wide), low_bytes);
    const auto both = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
    return bits_as<B>(_mm_cvtsi128_si64(both));
  }
  // Neither instruction minds how MXCSR treats denormals; the caller has made NaN canonical.
  static F from_f16(H half) { return bits_as<F>(_mm256_cvtph_ps(bits_as<__m128i>(half))); }
  static H to_f16(F value) {
    return bits_as<H>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

}  // namespace

void reduce_avx2(const Task& task) { reduce_task<Avx2>(task); }

}  // namespace cofire
