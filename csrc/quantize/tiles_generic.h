// The kernels of tiles.h, panel by panel; included once for each instruction set, in a namespace of its own. What is done to
// a row of numbers is the instruction set's own business: Plain, here, or what takes its place. Plain's loops are free of
// branches, so that the compiler makes vectors of them; it divides, and is right for every scale.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "quantize/tiles.h"
#include "quantize/turns.h"

namespace cofire::COFIRE_VARIANT {
namespace {

constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr uint64_t kQuantizeTiles = 1024, kDequantizeColumns = 2048;
constexpr uint64_t kLine = 16;  // numbers in 64 bytes, the line of most caches

// Columns of the panels that are quantised, by measurement. The next panel is on its way while one is worked on: narrow
// tiles have both in a core's L2 cache; for blocks, long stretches of a row count for more.
inline uint64_t quantize_columns(const TileGrid& grid) { return grid.width == 1 ? 256 : grid.height == 1 ? 1024 : 2048; }
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What tells E4M3 and E5M2 apart; `magic` is the float whose last place is the format's smallest number, and `over` what is
// made of numbers beyond the largest, which only a subnormal scale brings about.
template <Fp8 F>
struct Traits;
template <>
struct Traits<Fp8::e4m3> {
  static constexpr uint32_t shift = 20, bias = 120, smallest_normal = 0x3c800000, most = 0x7e, most_bits = 0x43e00000;
  static constexpr uint32_t over = most, over_bits = most_bits;
  static constexpr float magic = 16384.0f, largest = 448.0f, unit = 0x1p-9f;
};
template <>
struct Traits<Fp8::e5m2> {
  static constexpr uint32_t shift = 21, bias = 112, smallest_normal = 0x38800000, most = 0x7b, most_bits = 0x47600000;
  static constexpr uint32_t over = 0x7c, over_bits = kInfinity;
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
  code = code <= T::most ? code : T::over;
  code = a > kInfinity ? 0x7f : code;
  return static_cast<uint8_t>(code | ((b >> 24) & 0x80));
}

// The value of encode(y).
template <Fp8 F>
inline float rounded(float y) {
  using T = Traits<F>;
  const uint32_t b = bits_of(y), a = b & kMagnitude;
  uint32_t normal = round_bits<F>(a) & ~((1u << T::shift) - 1);
  normal = normal <= T::most_bits ? normal : T::over_bits;
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

// The scale that a byte of UE8M0 stands for.
inline float power_of_two(uint8_t code) {
  if (code == 0xff) return kNaN;
  return code ? float_of(uint32_t{code} << 23) : 0x1p-127f;
}

// Finds the scales of tiles whose largest magnitudes have these bits, and keeps them where that is wanted.
template <Fp8 F>
inline void find_scales(const uint32_t* amax, uint64_t n, const TileFormat& format, float* scale, void* kept, uint64_t at) {
  for (uint64_t i = 0; i < n; ++i) {
    const float found = std::max(float_of(amax[i]), format.floor) / Traits<F>::largest;
    scale[i] = amax[i] < kInfinity ? found : kNaN;
  }
  if (!format.power_of_two) {
    if (kept) std::copy_n(scale, n, static_cast<float*>(kept) + at);
    return;
  }
  for (uint64_t i = 0; i < n; ++i) {
    const uint32_t b = bits_of(scale[i]), above = (b >> 23) + ((b & 0x7fffff) != 0);
    const uint8_t code = static_cast<uint8_t>(b > kInfinity ? 0xff : b <= 0x00400000 ? 0 : above);
    scale[i] = power_of_two(code);
    if (kept) static_cast<uint8_t*>(kept)[at + i] = code;
  }
}

inline float scale_at(const void* scales, uint64_t at, const TileFormat& format) {
  return format.power_of_two ? power_of_two(static_cast<const uint8_t*>(scales)[at]) : static_cast<const float*>(scales)[at];
}

// A row of numbers, with one scale or with a scale for each column. What scales take to be worked with is prepared once for
// all rows of a panel.
template <Fp8 F>
struct Plain {
  struct Factor {
    float scale;
  };
  struct Columns {
    float scale[kQuantizeTiles];
  };
  struct Decoder {
    float scale[kDequantizeColumns];
  };

  static Factor prepare(float scale) { return {scale}; }
  static void prepare(Columns&, uint64_t) {}
  static void prepare(Decoder&, uint64_t) {}

  static uint32_t amax(const float* x, uint64_t n) {
    uint32_t found = 0;
    for (uint64_t i = 0; i < n; ++i) found = std::max(found, bits_of(x[i]) & kMagnitude);
    return found;
  }

  static void amax(const float* x, uint64_t n, uint32_t* found) {
    for (uint64_t i = 0; i < n; ++i) found[i] = std::max(found[i], bits_of(x[i]) & kMagnitude);
  }

  static void quantize(const float* x, uint64_t n, const Factor& factor, uint8_t* codes, float* values) {
    const float scale = factor.scale;
    if (codes)
      for (uint64_t i = 0; i < n; ++i) codes[i] = encode<F>(x[i] / scale);
    if (values)
      for (uint64_t i = 0; i < n; ++i) values[i] = rounded<F>(x[i] / scale) * scale;
  }

  static void quantize(const float* x, uint64_t n, const float* scale, uint8_t* codes, float* values) {
    if (codes)
      for (uint64_t i = 0; i < n; ++i) codes[i] = encode<F>(x[i] / scale[i]);
    if (values)
      for (uint64_t i = 0; i < n; ++i) values[i] = rounded<F>(x[i] / scale[i]) * scale[i];
  }

  static void quantize(const float* x, uint64_t n, const Columns& columns, uint8_t* codes, float* values) {
    quantize(x, n, columns.scale, codes, values);
  }

  static void dequantize(const uint8_t* codes, uint64_t n, float scale, float* values) {
    for (uint64_t i = 0; i < n; ++i) values[i] = decode<F>(codes[i]) * scale;
  }

  static void dequantize(const uint8_t* codes, uint64_t n, const float* scale, float* values) {
    for (uint64_t i = 0; i < n; ++i) values[i] = decode<F>(codes[i]) * scale[i];
  }

  static void dequantize(const uint8_t* codes, uint64_t n, const Decoder& decoder, uint64_t tile, float* values) {
    dequantize(codes, n, decoder.scale[tile], values);
  }

  static void dequantize(const uint8_t* codes, uint64_t n, const Decoder& decoder, float* values) {
    dequantize(codes, n, decoder.scale, values);
  }
};

// Whole tiles, side by side: their size, and the indices of the first number and of the first scale.
struct Panel {
  uint64_t rows = 0, columns = 0, tiles = 0, at = 0, scale_at = 0;
};

inline Panel panel_of(const TileGrid& grid, uint64_t panel_columns, uint64_t index) {
  const uint64_t of_band = grid.panels_of_band(panel_columns), most = grid.panel_tiles(panel_columns);
  const uint64_t band = index / of_band, tile = index % of_band * most, left = tile * grid.width;
  const uint64_t matrix = band / grid.row_tiles(), top = band % grid.row_tiles() * grid.height;
  const uint64_t tiles = std::min(most, grid.column_tiles() - tile);
  return {std::min(grid.height, grid.rows - top), std::min(tiles * grid.width, grid.columns - left), tiles,
          (matrix * grid.rows + top) * grid.columns + left, band * grid.column_tiles() + tile};
}

// Calls work(tile of the panel, index of its first number, numbers) for each tile of a row.
template <typename Work>
inline void over_tiles(const Panel& panel, const TileGrid& grid, uint64_t row, const Work& work) {
  const uint64_t at = panel.at + row * grid.columns;
  for (uint64_t left = 0, tile = 0; tile < panel.tiles; left += grid.width, ++tile)
    work(tile, at + left, std::min(grid.width, panel.columns - left));
}

template <typename T>
inline T* beyond(T* first, uint64_t at) {
  return first ? first + at : nullptr;
}

// Asks for n numbers of a row of a panel, from column `left` on; processors look no further than to the end of a page.
// Inlined, as GCC drops calls of functions that do nothing else.
[[gnu::always_inline]] inline void fetch(const float* x, const Panel& panel, const TileGrid& grid, uint64_t row, uint64_t left,
                                         uint64_t n) {
  if (row >= panel.rows) return;
  const uint64_t first = panel.at + row * grid.columns, last = first + std::min(left + n, panel.columns);
  for (uint64_t i = first + left; i < last; i += kLine) __builtin_prefetch(x + i);
}

// Tiles wider than a column. Both kinds of kernel ask for the next panel's numbers while they work on this one.
template <Fp8 F, typename Row>
void quantize_wide(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                   const Panel& panel, const Panel& next) {
  uint32_t amax[kQuantizeTiles];
  float scale[kQuantizeTiles];
  typename Row::Factor factor[kQuantizeTiles];
  std::fill_n(amax, panel.tiles, 0);
  for (uint64_t row = 0; row < panel.rows; ++row) {
    over_tiles(panel, grid, row,
               [&](uint64_t tile, uint64_t at, uint64_t n) { amax[tile] = std::max(amax[tile], Row::amax(x + at, n)); });
  }
  find_scales<F>(amax, panel.tiles, format, scale, scales, panel.scale_at);
  for (uint64_t tile = 0; tile < panel.tiles; ++tile) factor[tile] = Row::prepare(scale[tile]);
  for (uint64_t row = 0; row < panel.rows; ++row) {
    over_tiles(panel, grid, row, [&](uint64_t tile, uint64_t at, uint64_t n) {
      fetch(x, next, grid, row, tile * grid.width, n);
      Row::quantize(x + at, n, factor[tile], beyond(codes, at), beyond(values, at));
    });
  }
}

// Tiles of one column.
template <Fp8 F, typename Row>
void quantize_narrow(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                     const Panel& panel, const Panel& next) {
  uint32_t amax[kQuantizeTiles];
  typename Row::Columns columns;
  std::fill_n(amax, panel.tiles, 0);
  for (uint64_t row = 0; row < panel.rows; ++row) Row::amax(x + panel.at + row * grid.columns, panel.columns, amax);
  find_scales<F>(amax, panel.tiles, format, columns.scale, scales, panel.scale_at);
  Row::prepare(columns, panel.columns);
  for (uint64_t row = 0; row < panel.rows; ++row) {
    fetch(x, next, grid, row, 0, panel.columns);
    const uint64_t at = panel.at + row * grid.columns;
    Row::quantize(x + at, panel.columns, columns, beyond(codes, at), beyond(values, at));
  }
}

template <template <Fp8> typename Row, Fp8 F>
void quantize_as(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                 Turns& turns) {
  const auto kernel = grid.width == 1 ? quantize_narrow<F, Row<F>> : quantize_wide<F, Row<F>>;
  const auto panel_at = [&](uint64_t index) {
    return index < turns.count() ? panel_of(grid, quantize_columns(grid), index) : Panel{};
  };
  Turn turn(turns);
  for (Panel next = panel_at(turn.take()); next.rows;) {
    const Panel panel = next;
    next = panel_at(turn.take());
    kernel(x, codes, scales, values, grid, format, panel, next);
  }
}

template <template <Fp8> typename Row, Fp8 F>
void dequantize_as(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                   Turns& turns) {
  Turn turn(turns);
  for (uint64_t index; (index = turn.take()) < turns.count();) {
    const Panel panel = panel_of(grid, kDequantizeColumns, index);
    typename Row<F>::Decoder decoder;
    for (uint64_t i = 0; i < panel.tiles; ++i) decoder.scale[i] = scale_at(scales, panel.scale_at + i, format);
    Row<F>::prepare(decoder, panel.tiles);
    for (uint64_t row = 0; row < panel.rows; ++row) {
      const uint64_t at = panel.at + row * grid.columns;
      if (grid.width == 1) {
        Row<F>::dequantize(codes + at, panel.columns, decoder, values + at);
      } else {
        over_tiles(panel, grid, row, [&](uint64_t tile, uint64_t from, uint64_t n) {
          Row<F>::dequantize(codes + from, n, decoder, tile, values + from);
        });
      }
    }
  }
}

// The kernels for both formats with one kind of Row.
template <template <Fp8> typename Row>
void quantize_with(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                   Turns& turns) {
  const auto kernel = format.element == Fp8::e4m3 ? quantize_as<Row, Fp8::e4m3> : quantize_as<Row, Fp8::e5m2>;
  kernel(x, codes, scales, values, grid, format, turns);
}

template <template <Fp8> typename Row>
void dequantize_with(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                     Turns& turns) {
  const auto kernel = format.element == Fp8::e4m3 ? dequantize_as<Row, Fp8::e4m3> : dequantize_as<Row, Fp8::e5m2>;
  kernel(codes, scales, values, grid, format, turns);
}

}  // namespace
}  // namespace cofire::COFIRE_VARIANT
