// FP8 with scales of tiles: values to codes and scales, and back (DeepSeek-V3 technical report, 3.3.2).
//
// A tile is 1 row by `width` columns, `height` rows by 1 column, or a block of both. Its scale is
// max(amax, floor) / largest, in FP32 or as the next power of two (one byte, 2 ** (code - 127)), and NaN where a value of
// the tile is not finite. Codes are value / scale, rounded to nearest, ties to even. PyTorch's casts give the same codes.
#pragma once

#include <cstdint>

namespace cofire {

enum class Fp8 : int32_t { e4m3 = 0, e5m2 = 1 };

// Batches of matrices that lie one behind another, row by row; tiles begin anew with each matrix.
struct TileGrid {
  uint64_t batches = 1, rows = 0, columns = 0;
  uint64_t height = 1, width = 128;

  uint64_t row_tiles() const { return (rows + height - 1) / height; }
  uint64_t column_tiles() const { return (columns + width - 1) / width; }

  // A panel is what is worked on together: whole tiles, side by side, of about so many columns.
  uint64_t panel_tiles(uint64_t panel_columns) const { return width < panel_columns ? panel_columns / width : 1; }
  uint64_t panels_of_band(uint64_t panel_columns) const {
    return (column_tiles() + panel_tiles(panel_columns) - 1) / panel_tiles(panel_columns);
  }
};

struct TileFormat {
  Fp8 element = Fp8::e4m3;
  bool power_of_two = false;  // scales are bytes, else floats
  float floor = 1e-4f;
};

// Every processor gives the same bits; `plain` does without the instructions that not all have.
// `codes` and `scales` may be null where they are not wanted, and `values`, the codes' values times the scales, too.
void quantize_tiles(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                    uint32_t num_threads, bool plain = false);
void dequantize_tiles(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                      uint32_t num_threads, bool plain = false);

}  // namespace cofire
