// The kernels for AVX2 with FMA and F16C: vectors of 32 bytes, and the bits of Plain.
//
// Division. The scale s of a tile is inverted once, to two terms: r = RN(1 / s) and r_low = RN(RN(1 - r * s) * r). Then
// RN(x * r + RN(x * r_low)) may differ from RN(x / s) in the last place, but lies on the same side of all middles between
// neighbours in FP8, so that codes are the same. Tried for every significand of s, every middle and every x nearby: an s
// whose significand is all ones fails, no other does. Powers of two change nothing as long as no term leaves FP32's range.
//
// Rounding. Let c be 2^20 times the power of two at or below y, or the smallest normal number's (2^21 for E5M2). The last
// place of y + c is then the distance between y's neighbours in FP8: the addition rounds to nearest even, subnormals too.
// The low half of the sum's bits counts these distances, the high half has the exponent; with weights they add up to the code.
//
// Decoding. A code is an FP16 number without its last bits; E4M3's are 2^-8 of what they stand for, as its bias is less by 8.
#include <cmath>
#include <immintrin.h>

#define COFIRE_VARIANT avx2
#include "quantize/tiles_generic.h"

namespace cofire::avx2 {
namespace {

struct Avx2 {
  using Float = __m256;
  using Bits = __m256i;
  static constexpr uint64_t kLanes = 8;

  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Float x) { _mm256_storeu_ps(to, x); }
  static Float splat(float x) { return _mm256_set1_ps(x); }
  static Bits splat_bits(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
  static Bits bits(Float x) { return _mm256_castps_si256(x); }
  static Float number(Bits x) { return _mm256_castsi256_ps(x); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Bits max(Bits a, Bits b) { return _mm256_max_epu32(a, b); }

  static uint32_t max_of(Bits x) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  }

  // In each 32 bits, the low half times `low` plus the high half.
  static Bits weigh(Bits x, int low) { return _mm256_madd_epi16(x, _mm256_set1_epi32(1 << 16 | low)); }
  static Bits narrow_32(Bits a, Bits b) { return _mm256_packs_epi32(a, b); }
  static Bits narrow_16(Bits a, Bits b) { return _mm256_packs_epi16(a, b); }
  template <int kPlaces>
  static Bits shift_right(Bits x, int less) {
    return _mm256_srli_epi16(_mm256_sub_epi16(x, _mm256_set1_epi16(static_cast<short>(less))), kPlaces);
  }
  // Four vectors narrowed to one, which took turns by the 4 bytes.
  static Bits in_order(Bits x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }

  static void store_bytes(uint8_t* to, Bits x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
  static void store_quarter(uint8_t* to, Bits x) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(x));
  }

  static bool has_nan_of_e4m3(const uint8_t* codes) {
    const __m256i nan = _mm256_set1_epi8(0x7f), found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(found & nan, nan));
  }

  // FP16 of codes that are extended by their signs, shifted and masked.
  template <int kShift>
  static Float from_halves(const uint8_t* codes, int mask) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_cvtph_ps(_mm_slli_epi16(wide, kShift) & _mm_set1_epi16(static_cast<short>(mask)));
  }
};

template <Fp8 F>
struct Weights;
template <>
struct Weights<Fp8::e4m3> {
  // Both halves of a sum, the low one times `low`, make the code above `places` bits, too large by `bias`.
  static constexpr int places = 4, low = 1 << places, bias = (127 + 20 - 6) * 8 << places;
  static constexpr float lift = 0x1p20f, decode = 0x1p8f;
  static constexpr int half_shift = 7, half_mask = 0xbf80;  // The exponent is shorter than FP16's: the sign stands twice.
};
template <>
struct Weights<Fp8::e5m2> {
  static constexpr int places = 5, low = 1 << places, bias = (127 + 21 - 14) * 4 << places;
  static constexpr float lift = 0x1p21f, decode = 1.0f;
  static constexpr int half_shift = 8, half_mask = 0xff00;
};

// Where the arithmetic above is right. False of NaN.
inline bool is_safe(float scale) {
  return scale >= 0x1p-90f && scale <= 0x1p90f && (bits_of(scale) & 0x7fffff) != 0x7fffff;
}

inline float low_term(float scale, float inverse) { return std::fma(-inverse, scale, 1.0f) * inverse; }

template <Fp8 F>
struct Row {
  using Float = Avx2::Float;
  using Bits = Avx2::Bits;
  using T = Traits<F>;
  using W = Weights<F>;
  static constexpr uint64_t kLanes = Avx2::kLanes, kFour = 4 * Avx2::kLanes;

  struct Scales {
    Float scale, inverse, inverse_low;
  };

  struct Factor {
    float scale, inverse, inverse_low;
    bool safe;
    Scales at(uint64_t) const { return {Avx2::splat(scale), Avx2::splat(inverse), Avx2::splat(inverse_low)}; }
  };

  struct Columns {
    float scale[kQuantizeTiles], inverse[kQuantizeTiles], inverse_low[kQuantizeTiles];
    bool safe;
    Scales at(uint64_t i) const { return {Avx2::load(scale + i), Avx2::load(inverse + i), Avx2::load(inverse_low + i)}; }
  };

  struct Decoder {
    float scale[kDequantizeColumns], factor[kDequantizeColumns];
    bool safe;
  };

  static Factor prepare(float scale) {
    const float inverse = 1.0f / scale;
    return {scale, inverse, low_term(scale, inverse), is_safe(scale)};
  }

  static void prepare(Columns& columns, uint64_t n) {
    columns.safe = true;
    for (uint64_t i = 0; i < n; ++i) {
      columns.inverse[i] = 1.0f / columns.scale[i];
      columns.inverse_low[i] = low_term(columns.scale[i], columns.inverse[i]);
      columns.safe &= is_safe(columns.scale[i]);
    }
  }

  static void prepare(Decoder& decoder, uint64_t n) {
    decoder.safe = true;
    for (uint64_t i = 0; i < n; ++i) {
      decoder.factor[i] = decoder.scale[i] * W::decode;
      decoder.safe &= !(std::fabs(decoder.scale[i]) > 0x1p119f);
    }
  }

  static Bits magnitude(const float* x) { return Avx2::bits(Avx2::load(x)) & Avx2::splat_bits(kMagnitude); }

  static uint32_t amax(const float* x, uint64_t n) {
    Bits found[4] = {};
    uint64_t i = 0;
    for (; i + kFour <= n; i += kFour)
      for (uint64_t j = 0; j < 4; ++j) found[j] = Avx2::max(found[j], magnitude(x + i + j * kLanes));
    for (; i + kLanes <= n; i += kLanes) found[0] = Avx2::max(found[0], magnitude(x + i));
    const uint32_t most = Avx2::max_of(Avx2::max(Avx2::max(found[0], found[1]), Avx2::max(found[2], found[3])));
    return i < n ? std::max(most, Plain<F>::amax(x + i, n - i)) : most;
  }

  static void amax(const float* x, uint64_t n, uint32_t* found) { Plain<F>::amax(x, n, found); }

  static void quantize(const float* x, uint64_t n, const Factor& factor, uint8_t* codes, float* values) {
    const uint64_t done = factor.safe ? quantize_vectors(x, n, factor, codes, values) : 0;
    if (done == n) return;
    Plain<F>::quantize(x + done, n - done, typename Plain<F>::Factor{factor.scale}, beyond(codes, done), beyond(values, done));
  }

  static void quantize(const float* x, uint64_t n, const Columns& columns, uint8_t* codes, float* values) {
    const uint64_t done = columns.safe ? quantize_vectors(x, n, columns, codes, values) : 0;
    Plain<F>::quantize(x + done, n - done, columns.scale + done, beyond(codes, done), beyond(values, done));
  }

  static void dequantize(const uint8_t* codes, uint64_t n, const Decoder& decoder, uint64_t tile, float* values) {
    const Float factor = Avx2::splat(decoder.factor[tile]);
    uint64_t i = 0;
    for (; decoder.safe && i + kFour <= n && are_numbers(codes + i); i += kFour)
      for (uint64_t j = i; j < i + kFour; j += kLanes) Avx2::store(values + j, decode_vector(codes + j) * factor);
    if (i < n) Plain<F>::dequantize(codes + i, n - i, decoder.scale[tile], values + i);
  }

  static void dequantize(const uint8_t* codes, uint64_t n, const Decoder& decoder, float* values) {
    uint64_t i = 0;
    for (; decoder.safe && i + kFour <= n && are_numbers(codes + i); i += kFour)
      for (uint64_t j = i; j < i + kFour; j += kLanes)
        Avx2::store(values + j, decode_vector(codes + j) * Avx2::load(decoder.factor + j));
    Plain<F>::dequantize(codes + i, n - i, decoder.scale + i, values + i);
  }

 private:
  // Returns how many numbers filled vectors; the others are left.
  template <typename Source>
  static uint64_t quantize_vectors(const float* x, uint64_t n, const Source& scales, uint8_t* codes, float* values) {
    if (!values) return codes ? quantize_some<true, false>(x, n, scales, codes, values) : n;
    if (!codes) return quantize_some<false, true>(x, n, scales, codes, values);
    return quantize_some<true, true>(x, n, scales, codes, values);
  }

  template <bool kCodes, bool kValues, typename Source>
  static uint64_t quantize_some(const float* x, uint64_t n, const Source& scales, uint8_t* codes, float* values) {
    uint64_t i = 0;
    for (; i + kFour <= n; i += kFour) {
      Bits from[4], sums[4];
      for (uint64_t j = 0; j < 4; ++j) {
        const uint64_t at = i + j * kLanes;
        from[j] = Avx2::bits(Avx2::load(x + at));
        sums[j] = quantize_vector<kValues>(from[j], scales.at(at), beyond(values, at));
      }
      if (kCodes) Avx2::store_bytes(codes + i, encode_sums(sums, from));
    }
    for (; i + kLanes <= n; i += kLanes) {
      const Bits one = Avx2::bits(Avx2::load(x + i)), sum = quantize_vector<kValues>(one, scales.at(i), beyond(values, i));
      const Bits from[4] = {one, one, one, one}, sums[4] = {sum, sum, sum, sum};
      if (kCodes) Avx2::store_quarter(codes + i, encode_sums(sums, from));
    }
    return i;
  }

  // Returns the bits of y + c, and stores the values where they are wanted.
  template <bool kValues>
  static Bits quantize_vector(Bits from, const Scales& scales, float* values) {
    const Float x = Avx2::number(from & Avx2::splat_bits(kMagnitude)), lift = Avx2::splat(W::lift);
    const Float y = Avx2::fma(x, scales.inverse, x * scales.inverse_low);
    const Bits exponent = Avx2::bits(y) & Avx2::splat_bits(kInfinity);
    const Float power = Avx2::number(Avx2::max(exponent, Avx2::splat_bits(T::smallest_normal)));
    const Float sum = Avx2::fma(power, lift, y);
    if (kValues) {
      const Bits value = Avx2::bits((sum - power * lift) * scales.scale);
      Avx2::store(values, Avx2::number(value | (from & Avx2::splat_bits(~kMagnitude))));
    }
    return Avx2::bits(sum);
  }

  static Bits encode_sums(const Bits (&sums)[4], const Bits (&from)[4]) {
    Bits halves[2], signs[2];
    for (int j = 0; j < 2; ++j) {
      const Bits both = Avx2::narrow_32(Avx2::weigh(sums[2 * j], W::low), Avx2::weigh(sums[2 * j + 1], W::low));
      halves[j] = Avx2::shift_right<W::places>(both, W::bias);
      signs[j] = Avx2::narrow_32(from[2 * j], from[2 * j + 1]);
    }
    const Bits sign = Avx2::narrow_16(signs[0], signs[1]) & Avx2::splat_bits(0x80808080);
    return Avx2::in_order(Avx2::narrow_16(halves[0], halves[1]) | sign);
  }

  // Whether FP16 has what the codes stand for: all but E4M3's NaN.
  static bool are_numbers(const uint8_t* codes) { return F == Fp8::e5m2 || !Avx2::has_nan_of_e4m3(codes); }

  static Float decode_vector(const uint8_t* codes) { return Avx2::from_halves<W::half_shift>(codes, W::half_mask); }
};

}  // namespace

void quantize_panels(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                     Turns& turns) {
  quantize_with<Row>(x, codes, scales, values, grid, format, turns);
}

void dequantize_panels(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                       Turns& turns) {
  dequantize_with<Row>(codes, scales, values, grid, format, turns);
}

}  // namespace cofire::avx2
