// The kernel for AVX2 and F16C: vectors of 32 bytes.
#include <immintrin.h>

#include "kernels/generic.h"

namespace cofire {
namespace {

struct Avx2 {
  static constexpr bool has_f16c = true;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t S __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(32)));
  typedef double D __attribute__((vector_size(32)));
  typedef int64_t L __attribute__((vector_size(32)));
  typedef uint64_t M __attribute__((vector_size(32)));
  typedef uint16_t Short __attribute__((vector_size(16)));

  // F16C does not mind how MXCSR treats denormals; the caller has made NaN canonical.
  static F from_f16(Short half) { return bits_as<F>(_mm256_cvtph_ps(bits_as<__m128i>(half))); }
  static Short to_f16(F value) {
    return bits_as<Short>(_mm256_cvtps_ph(bits_as<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static Parts<Short, 2> halves(H whole) {
    const auto both = bits_as<__m256i>(whole);
    return {{bits_as<Short>(_mm256_castsi256_si128(both)), bits_as<Short>(_mm256_extracti128_si256(both, 1))}};
  }
  static Parts<H, 2> sign_extend(U bytes) {
    const auto both = bits_as<__m256i>(bytes);
    return {{bits_as<H>(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(both))),
             bits_as<H>(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(both, 1)))}};
  }
  static U join_bytes(const Parts<U, 4>& wide) {
    auto part = [&](int p) { return bits_as<__m256i>(wide.part[p]); };
    const auto low = _mm256_packus_epi32(part(0), part(1)), high = _mm256_packus_epi32(part(2), part(3));
    // Packing works within halves of 16 bytes: those now hold 4 bytes of each part.
    const auto order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return bits_as<U>(_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
  }
};

}  // namespace

void reduce_avx2(const Task& task) { reduce_task<Avx2>(task); }

}  // namespace cofire
