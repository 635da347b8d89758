// The Python module cofire.precision._native; only cofire/precision/cpu_kernels.py imports it. Addresses are integers.
#include <nanobind/nanobind.h>

#include "quantize/tiles.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

cofire::TileGrid grid_of(uint64_t batches, uint64_t rows, uint64_t columns, uint64_t height, uint64_t width) {
  if (!height || !width) throw nb::value_error("a tile has a row and a column at least");
  return {batches, rows, columns, height, width};
}

cofire::TileFormat format_of(int element, bool power_of_two, float floor) {
  if (element < 0 || element > 1) throw nb::value_error("unknown element type");
  return {static_cast<cofire::Fp8>(element), power_of_two, floor};
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Tiles of FP8 with scales (native core of cofire.precision).";
  module.def(
      "quantize",
      [](uintptr_t x, uintptr_t codes, uintptr_t scales, uintptr_t values, uint64_t batches, uint64_t rows, uint64_t columns,
         uint64_t height, uint64_t width, int element, bool power_of_two, float floor, uint32_t num_threads, bool plain) {
        const auto grid = grid_of(batches, rows, columns, height, width);
        const auto format = format_of(element, power_of_two, floor);
        nb::gil_scoped_release release;
        cofire::quantize_tiles(reinterpret_cast<const float*>(x), reinterpret_cast<uint8_t*>(codes), reinterpret_cast<void*>(scales),
                               reinterpret_cast<float*>(values), grid, format, num_threads, plain);
      },
      "x"_a, "codes"_a, "scales"_a, "values"_a, "batches"_a, "rows"_a, "columns"_a, "height"_a, "width"_a, "element"_a,
      "power_of_two"_a, "floor"_a, "num_threads"_a, "plain"_a = false);
  module.def(
      "dequantize",
      [](uintptr_t codes, uintptr_t scales, uintptr_t values, uint64_t batches, uint64_t rows, uint64_t columns, uint64_t height,
         uint64_t width, int element, bool power_of_two, uint32_t num_threads, bool plain) {
        const auto grid = grid_of(batches, rows, columns, height, width);
        const auto format = format_of(element, power_of_two, 0.0f);
        nb::gil_scoped_release release;
        cofire::dequantize_tiles(reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const void*>(scales),
                                 reinterpret_cast<float*>(values), grid, format, num_threads, plain);
      },
      "codes"_a, "scales"_a, "values"_a, "batches"_a, "rows"_a, "columns"_a, "height"_a, "width"_a, "element"_a,
      "power_of_two"_a, "num_threads"_a, "plain"_a = false);
}
