// AVX2 with F16C: 8 floats or 4 doubles at once. Compiled for it; called only where the processor has it.
#include <immintrin.h>

#include "kernels/variants.h"

namespace cofire {
namespace {

// Types of their own, since integer vectors of both widths are one type to the compiler.
struct F { __m256 v; };
struct D { __m256d v; };
struct I { __m256i v; };
struct L { __m256i v; };

__m256i bits(__m256 v) { return _mm256_castps_si256(v); }
__m256 floats(__m256i v) { return _mm256_castsi256_ps(v); }
__m256i words(int v) { return _mm256_set1_epi32(v); }
__m256i choose(__m256i no, __m256i yes, __m256i mask) { return _mm256_blendv_epi8(no, yes, mask); }
__m256i nans(F a) { return bits(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)); }

F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
F multiply(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
F divide(F a, double by) { return {_mm256_div_ps(a.v, _mm256_set1_ps(static_cast<float>(by)))}; }
// Of equal numbers, the sign tells zeros apart: both bits for the greatest, either for the least. A NaN stays one.
F pick(F a, F b, __m256 first, __m256 equal) {
  const __m256 chosen = _mm256_blendv_ps(_mm256_blendv_ps(b.v, a.v, first), equal, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
  return {_mm256_blendv_ps(chosen, _mm256_add_ps(a.v, b.v), _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q))};
}
F least(F a, F b) { return pick(a, b, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ), _mm256_or_ps(a.v, b.v)); }
F greatest(F a, F b) { return pick(a, b, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ), _mm256_and_ps(a.v, b.v)); }

D add(D a, D b) { return {_mm256_add_pd(a.v, b.v)}; }
D multiply(D a, D b) { return {_mm256_mul_pd(a.v, b.v)}; }
D divide(D a, double by) { return {_mm256_div_pd(a.v, _mm256_set1_pd(by))}; }
D pick(D a, D b, __m256d first, __m256d equal) {
  const __m256d chosen = _mm256_blendv_pd(_mm256_blendv_pd(b.v, a.v, first), equal, _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ));
  return {_mm256_blendv_pd(chosen, _mm256_add_pd(a.v, b.v), _mm256_cmp_pd(a.v, b.v, _CMP_UNORD_Q))};
}
D least(D a, D b) { return pick(a, b, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ), _mm256_or_pd(a.v, b.v)); }
D greatest(D a, D b) { return pick(a, b, _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ), _mm256_and_pd(a.v, b.v)); }

I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
I multiply(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
I least(I a, I b) { return {_mm256_min_epi32(a.v, b.v)}; }
I greatest(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
L add(L a, L b) { return {_mm256_add_epi64(a.v, b.v)}; }
L least(L a, L b) { return {choose(a.v, b.v, _mm256_cmpgt_epi64(a.v, b.v))}; }
L greatest(L a, L b) { return {choose(b.v, a.v, _mm256_cmpgt_epi64(a.v, b.v))}; }
L multiply(L a, L b) {
  // The low 64 bits of a product, from products of halves.
  const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), b.v), _mm256_mul_epu32(a.v, _mm256_srli_epi64(b.v, 32)));
  return {_mm256_add_epi64(_mm256_mul_epu32(a.v, b.v), _mm256_slli_epi64(cross, 32))};
}
template <class V>
V bit_and(V a, V b) { return {_mm256_and_si256(a.v, b.v)}; }
template <class V>
V bit_or(V a, V b) { return {_mm256_or_si256(a.v, b.v)}; }
template <class V>
V bit_xor(V a, V b) { return {_mm256_xor_si256(a.v, b.v)}; }
// Not called: whole numbers are averaged one by one.
I divide(I a, double) { return a; }
L divide(L a, double) { return a; }

const __m128i* at128(const char* at) { return reinterpret_cast<const __m128i*>(at); }
__m128i* at128(char* at) { return reinterpret_cast<__m128i*>(at); }
const __m256i* at256(const char* at) { return reinterpret_cast<const __m256i*>(at); }
__m256i* at256(char* at) { return reinterpret_cast<__m256i*>(at); }

void store_halves(char* at, __m256i v) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
  _mm_storeu_si128(at128(at), _mm256_castsi256_si128(packed));
}

void store_bytes(char* at, __m256i v) {
  const __m256i lowest = _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                                                 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i joined = _mm256_permutevar8x32_epi32(lowest, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0));
  _mm_storel_epi64(at128(at), _mm256_castsi256_si128(joined));
}

// As `narrow` in reduce_scalar.cpp.
template <int shift, int bias, int denormal_exponent>
__m256i narrow(__m256i magnitude) {
  const __m256i offset = words(denormal_exponent << 23);
  const __m256i denormal = _mm256_sub_epi32(bits(_mm256_add_ps(floats(magnitude), floats(offset))), offset);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, shift), words(1));
  const __m256i moved = _mm256_add_epi32(magnitude, words((1 << (shift - 1)) - 1 - ((127 - bias) << 23)));
  const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(moved, odd), shift);
  return choose(normal, denormal, _mm256_cmpgt_epi32(words((128 - bias) << 23), magnitude));
}

__m256i magnitude_of(F a) { return _mm256_and_si256(bits(a.v), words(0x7fffffff)); }
__m256i sign_of(F a) { return _mm256_slli_epi32(_mm256_srli_epi32(bits(a.v), 31), 7); }
F canonical(F a) { return {floats(choose(bits(a.v), words(0x7fc00000), nans(a)))}; }

template <Element element>
struct Codec;

template <>
struct Codec<Element::f32> {
  using Vector = F;
  static constexpr size_t kSize = 4, kWidth = 8;
  static F load(const char* at) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(at))}; }
  static void store(char* at, F a) { _mm256_storeu_ps(reinterpret_cast<float*>(at), canonical(a).v); }
};
template <>
struct Codec<Element::f64> {
  using Vector = D;
  static constexpr size_t kSize = 8, kWidth = 4;
  static D load(const char* at) { return {_mm256_loadu_pd(reinterpret_cast<const double*>(at))}; }
  static void store(char* at, D a) {
    const __m256d nan = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000));
    _mm256_storeu_pd(reinterpret_cast<double*>(at), _mm256_blendv_pd(a.v, nan, _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)));
  }
};
template <>
struct Codec<Element::f16> {
  using Vector = F;
  static constexpr size_t kSize = 2, kWidth = 8;
  static F load(const char* at) { return {_mm256_cvtph_ps(_mm_loadu_si128(at128(at)))}; }
  static void store(char* at, F a) { _mm_storeu_si128(at128(at), _mm256_cvtps_ph(canonical(a).v, _MM_FROUND_TO_NEAREST_INT)); }
};
template <>
struct Codec<Element::bf16> {
  using Vector = F;
  static constexpr size_t kSize = 2, kWidth = 8;
  static F load(const char* at) { return {floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at128(at))), 16))}; }
  static void store(char* at, F a) {
    const __m256i from = bits(a.v), odd = _mm256_and_si256(_mm256_srli_epi32(from, 16), words(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(from, words(0x7fff)), odd), 16);
    store_halves(at, choose(rounded, words(0x7fc0), nans(a)));
  }
};
template <>
struct Codec<Element::e4m3> {
  using Vector = F;
  static constexpr size_t kSize = 1, kWidth = 8;
  static F load(const char* at) {
    const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at128(at))), rest = _mm256_and_si256(from, words(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(from, words(0x80)), 24);
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(rest, 20), words(120 << 23));
    const __m256i denormal = bits(_mm256_mul_ps(_mm256_cvtepi32_ps(rest), _mm256_set1_ps(0x1p-9f)));
    const __m256i number = _mm256_or_si256(sign, choose(normal, denormal, _mm256_cmpgt_epi32(words(8), rest)));
    return {floats(choose(number, words(0x7fc00000), _mm256_cmpeq_epi32(rest, words(0x7f))))};
  }
  static void store(char* at, F a) {
    const __m256i magnitude = magnitude_of(a), number = narrow<20, 7, 141>(magnitude);
    // Beyond the largest number, or NaN.
    const __m256i none = _mm256_or_si256(_mm256_cmpgt_epi32(magnitude, words(0x43efffff)), _mm256_cmpgt_epi32(number, words(0x7e)));
    store_bytes(at, choose(_mm256_or_si256(number, sign_of(a)), words(0x7f), none));
  }
};
template <>
struct Codec<Element::e5m2> {
  using Vector = F;
  static constexpr size_t kSize = 1, kWidth = 8;
  static F load(const char* at) {
    return {_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(at128(at))), 8))};
  }
  static void store(char* at, F a) {
    const __m256i magnitude = magnitude_of(a);
    const __m256i large = _mm256_cmpgt_epi32(magnitude, words(0x477fffff));
    const __m256i number = choose(narrow<21, 15, 134>(magnitude), words(0x7c), large);
    store_bytes(at, choose(_mm256_or_si256(number, sign_of(a)), words(0x7f), nans(a)));
  }
};
template <>
struct Codec<Element::i32> {
  using Vector = I;
  static constexpr size_t kSize = 4, kWidth = 8;
  static I load(const char* at) { return {_mm256_loadu_si256(at256(at))}; }
  static void store(char* at, I a) { _mm256_storeu_si256(at256(at), a.v); }
};
template <>
struct Codec<Element::i64> {
  using Vector = L;
  static constexpr size_t kSize = 8, kWidth = 4;
  static L load(const char* at) { return {_mm256_loadu_si256(at256(at))}; }
  static void store(char* at, L a) { _mm256_storeu_si256(at256(at), a.v); }
};

#include "kernels/loop.inc"

}  // namespace

size_t reduce_avx2(Element element, Op op, char* target, const char* const* sources, size_t num_sources, size_t count,
                   double divisor) {
  const bool whole = element == Element::i32 || element == Element::i64;
  if (whole && op == Op::average) return 0;
  return reduce_any(element, op, target, sources, num_sources, count, divisor);
}

}  // namespace cofire
