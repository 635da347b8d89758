// The kernel for AVX-512 (F, BW, DQ, VL): vectors of 64 bytes. It keeps away from the instructions of AVX512_BF16.
#include <immintrin.h>

#include "kernels/generic.h"

namespace cofire {
namespace {

struct Halves {
  __m256i part[2];
};

struct Quarters {
  __m128i part[4];
};

struct Avx512 {
  static constexpr bool has_f16c = true;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t S __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint16_t H __attribute__((vector_size(64)));
  typedef double D __attribute__((vector_size(64)));
  typedef int64_t L __attribute__((vector_size(64)));
  typedef uint64_t M __attribute__((vector_size(64)));
  typedef uint16_t Short __attribute__((vector_size(32)));

  // The forms with a mask, here of all lanes: GCC 12 warns that the others read what was never set.
  static constexpr uint16_t all = 0xffff;

  static F from_f16(Short half) { return bits_as<F>(_mm512_maskz_cvtph_ps(all, bits_as<__m256i>(half))); }
  static Short to_f16(F value) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return bits_as<Short>(_mm512_maskz_cvtps_ph(all, bits_as<__m512>(value), nearest));
  }
  static Parts<Short, 2> halves(H whole) { return bits_as<Parts<Short, 2>>(whole); }
  static Parts<H, 2> sign_extend(U bytes) {
    const auto halves = bits_as<Halves>(bytes);
    return {{bits_as<H>(_mm512_cvtepi8_epi16(halves.part[0])), bits_as<H>(_mm512_cvtepi8_epi16(halves.part[1]))}};
  }
  static U join_bytes(const Parts<U, 4>& wide) {
    Quarters quarters;
    for (int p = 0; p < 4; ++p) {
      quarters.part[p] = _mm512_maskz_cvtepi32_epi8(all, bits_as<__m512i>(wide.part[p]));
    }
    return bits_as<U>(quarters);
  }
};

}  // namespace

void reduce_avx512(const Task& task) { reduce_task<Avx512>(task); }

}  // namespace cofire
