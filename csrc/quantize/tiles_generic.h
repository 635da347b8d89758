// The kernels of tiles.h for bands of tiles; included once for each instruction set, in a namespace of its own.
// Loops are plain and free of branches, so that the compiler makes vectors of them.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "quantize/tiles.h"

namespace cofire::COFIRE_VARIANT {
namespace {

constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr uint64_t kStrip = 64;  // columns of 128 x 1 tiles that are worked on together

// What tells E4M3 and E5M2 apart; `magic` is the float whose last place is the format's smallest number.
template <Fp8 F>
struct Traits;
template <>
struct Traits<Fp8::e4m3> {
  static constexpr uint32_t shift = 20, bias = 120, smallest_normal = 0x3c800000, most = 0x7e, most_bits = 0x43e00000;
  static constexpr float magic = 16384.0f, largest = 448.0f, unit = 0x1p-9f;
};
template <>
struct Traits<Fp8::e5m2> {
  static constexpr uint32_t shift = 21, bias = 112, smallest_normal = 0x38800000, most = 0x7b, most_bits = 0x47600000;
  static constexpr float magic = 128.0f, largest = 57344.0f, unit = 0x1p-16f;
};

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

template <Fp8 F>
inline uint32_t round_bits(uint32_t magnitude) {
  constexpr uint32_t half = (1u << (Traits<F>::shift - 1)) - 1;
  return magnitude + half + ((magnitude >> Traits<F>::shift) & 1);
}

template <Fp8 F>
inline uint8_t encode(float y) {
  using T = Traits<F>;
  const uint32_t b = bits_of(y), a = b & kMagnitude;
  const uint32_t normal = (round_bits<F>(a) >> T::shift) - (T::bias << (23 - T::shift));
  const uint32_t small = bits_of(float_of(a) + T::magic) - bits_of(T::magic);
  uint32_t code = a < T::smallest_normal ? small : normal;
  code = code < T::most ? code : T::most;
  code = a > kInfinity ? 0x7f : code;
  return static_cast<uint8_t>(code | ((b >> 24) & 0x80));
}

// The value of encode(y).
template <Fp8 F>
inline float rounded(float y) {
  using T = Traits<F>;
  const uint32_t b = bits_of(y), a = b & kMagnitude;
  uint32_t normal = round_bits<F>(a) & ~((1u << T::shift) - 1);
  normal = normal < T::most_bits ? normal : T::most_bits;
  const uint32_t small = bits_of((float_of(a) + T::magic) - T::magic);
  uint32_t r = a < T::smallest_normal ? small : normal;
  r = a > kInfinity ? a : r;
  return float_of(r | (b & ~kMagnitude));
}

template <Fp8 F>
inline float decode(uint8_t code) {
  using T = Traits<F>;
  constexpr uint32_t mantissa = 23 - T::shift;
  const uint32_t c = code & 0x7f, sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t normal = (c << T::shift) + (T::bias << 23);
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(c)) * T::unit);
  uint32_t r = c < (1u << mantissa) ? small : normal;
  r = c > T::most ? (F == Fp8::e5m2 && c == 0x7c ? kInfinity : 0x7fc00000u) : r;
  return float_of(r | sign);
}

// The scale of a tile whose largest magnitude has these bits; its byte where scales are powers of two.
template <Fp8 F>
inline float scale_of(uint32_t amax, const TileFormat& format, uint8_t& code) {
  if (amax >= kInfinity) {
    code = 0xff;
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::max(float_of(amax), format.floor) / Traits<F>::largest;
  if (!format.power_of_two) return scale;
  const uint32_t b = bits_of(scale);
  code = b <= 0x00400000 ? 0 : static_cast<uint8_t>((b >> 23) + ((b & 0x7fffff) != 0));
  return code ? float_of(uint32_t{code} << 23) : 0x1p-127f;
}

inline float scale_at(const void* scales, uint64_t at, const TileFormat& format) {
  if (!format.power_of_two) return static_cast<const float*>(scales)[at];
  const uint8_t code = static_cast<const uint8_t*>(scales)[at];
  if (code == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return code ? float_of(uint32_t{code} << 23) : 0x1p-127f;
}

inline void keep_scale(void* scales, uint64_t at, const TileFormat& format, float scale, uint8_t code) {
  if (!scales) return;
  if (format.power_of_two) {
    static_cast<uint8_t*>(scales)[at] = code;
  } else {
    static_cast<float*>(scales)[at] = scale;
  }
}

// Rows [top, top + height) of one matrix whose tiles are wider than a column.
template <Fp8 F>
void quantize_wide(const float* x, uint8_t* codes, void* scales, float* values, uint64_t scale_at, uint64_t height,
                   const TileGrid& grid, const TileFormat& format) {
  const uint64_t stride = grid.columns;
  for (uint64_t left = 0; left < grid.columns; left += grid.width, ++scale_at) {
    const uint64_t n = std::min(grid.width, grid.columns - left);
    uint32_t amax = 0;
    for (uint64_t row = 0; row < height; ++row) {
      const float* from = x + row * stride + left;
      for (uint64_t i = 0; i < n; ++i) {
        const uint32_t a = bits_of(from[i]) & kMagnitude;
        amax = amax > a ? amax : a;
      }
    }
    uint8_t code = 0;
    const float scale = scale_of<F>(amax, format, code);
    keep_scale(scales, scale_at, format, scale, code);
    for (uint64_t row = 0; row < height; ++row) {
      const float* from = x + row * stride + left;
      if (codes) {
        uint8_t* to = codes + row * stride + left;
        for (uint64_t i = 0; i < n; ++i) to[i] = encode<F>(from[i] / scale);
      }
      if (values) {
        float* to = values + row * stride + left;
        for (uint64_t i = 0; i < n; ++i) to[i] = rounded<F>(from[i] / scale) * scale;
      }
    }
  }
}

// The same where a tile is one column: a strip of columns at a time.
template <Fp8 F>
void quantize_narrow(const float* x, uint8_t* codes, void* scales, float* values, uint64_t scale_at, uint64_t height,
                     const TileGrid& grid, const TileFormat& format) {
  const uint64_t stride = grid.columns;
  for (uint64_t left = 0; left < grid.columns; left += kStrip) {
    const uint64_t n = std::min(kStrip, grid.columns - left);
    uint32_t amax[kStrip] = {};
    float scale[kStrip];
    for (uint64_t row = 0; row < height; ++row) {
      const float* from = x + row * stride + left;
      for (uint64_t i = 0; i < n; ++i) {
        const uint32_t a = bits_of(from[i]) & kMagnitude;
        amax[i] = amax[i] > a ? amax[i] : a;
      }
    }
    for (uint64_t i = 0; i < n; ++i) {
      uint8_t code = 0;
      scale[i] = scale_of<F>(amax[i], format, code);
      keep_scale(scales, scale_at + left + i, format, scale[i], code);
    }
    for (uint64_t row = 0; row < height; ++row) {
      const float* from = x + row * stride + left;
      if (codes) {
        uint8_t* to = codes + row * stride + left;
        for (uint64_t i = 0; i < n; ++i) to[i] = encode<F>(from[i] / scale[i]);
      }
      if (values) {
        float* to = values + row * stride + left;
        for (uint64_t i = 0; i < n; ++i) to[i] = rounded<F>(from[i] / scale[i]) * scale[i];
      }
    }
  }
}

template <Fp8 F>
void quantize_as(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                 uint64_t first, uint64_t last) {
  for (uint64_t band = first; band < last; ++band) {
    const uint64_t matrix = band / grid.row_tiles(), top = band % grid.row_tiles() * grid.height;
    const uint64_t at = (matrix * grid.rows + top) * grid.columns, height = std::min(grid.height, grid.rows - top);
    const auto kernel = grid.width == 1 ? quantize_narrow<F> : quantize_wide<F>;
    kernel(x + at, codes ? codes + at : nullptr, scales, values ? values + at : nullptr, band * grid.column_tiles(), height, grid,
           format);
  }
}

template <Fp8 F>
void dequantize_as(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                   uint64_t first, uint64_t last) {
  for (uint64_t band = first; band < last; ++band) {
    const uint64_t matrix = band / grid.row_tiles(), top = band % grid.row_tiles() * grid.height;
    const uint64_t height = std::min(grid.height, grid.rows - top), step = grid.width == 1 ? kStrip : grid.width;
    for (uint64_t left = 0; left < grid.columns; left += step) {
      const uint64_t n = std::min(step, grid.columns - left), tile = band * grid.column_tiles();
      float scale[kStrip];
      if (grid.width == 1)
        for (uint64_t i = 0; i < n; ++i) scale[i] = scale_at(scales, tile + left + i, format);
      const float one = scale_at(scales, tile + left / grid.width, format);
      for (uint64_t row = 0; row < height; ++row) {
        const uint64_t at = (matrix * grid.rows + top + row) * grid.columns + left;
        if (grid.width == 1) {
          for (uint64_t i = 0; i < n; ++i) values[at + i] = decode<F>(codes[at + i]) * scale[i];
        } else {
          for (uint64_t i = 0; i < n; ++i) values[at + i] = decode<F>(codes[at + i]) * one;
        }
      }
    }
  }
}

}  // namespace

void quantize_bands(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                    uint64_t first, uint64_t last) {
  const auto kernel = format.element == Fp8::e4m3 ? quantize_as<Fp8::e4m3> : quantize_as<Fp8::e5m2>;
  kernel(x, codes, scales, values, grid, format, first, last);
}

void dequantize_bands(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                      uint64_t first, uint64_t last) {
  const auto kernel = format.element == Fp8::e4m3 ? dequantize_as<Fp8::e4m3> : dequantize_as<Fp8::e5m2>;
  kernel(codes, scales, values, grid, format, first, last);
}

}  // namespace cofire::COFIRE_VARIANT
