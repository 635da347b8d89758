#define COFIRE_VARIANT scalar
#include "quantize/tiles_generic.h"

#include <thread>
#include <vector>

#include "kernels/kernels.h"

namespace cofire {

#ifdef COFIRE_X86
namespace avx2 {
void quantize_panels(const float*, uint8_t*, void*, float*, const TileGrid&, const TileFormat&, Turns&);
void dequantize_panels(const uint8_t*, const void*, float*, const TileGrid&, const TileFormat&, Turns&);
}  // namespace avx2
#endif

namespace {

using Quantize = decltype(&scalar::quantize_with<scalar::Plain>);
using Dequantize = decltype(&scalar::dequantize_with<scalar::Plain>);

struct Kernels {
  Quantize quantize = scalar::quantize_with<scalar::Plain>;
  Dequantize dequantize = scalar::dequantize_with<scalar::Plain>;
};

Kernels find_kernels(bool plain) {
#ifdef COFIRE_X86
  static const bool has_avx2 = has_isa(Isa::avx2) && __builtin_cpu_supports("fma");
  if (has_avx2 && !plain) return {avx2::quantize_panels, avx2::dequantize_panels};
#endif
  static_cast<void>(plain);
  return {};
}

// Starting a thread costs more than a small matrix does.
template <typename Work>
void over_panels(const TileGrid& grid, uint64_t panel_columns, uint32_t num_threads, const Work& work) {
  constexpr uint64_t kLeast = 1 << 20, kTurns = 8;
  const uint64_t elements = grid.batches * grid.rows * grid.columns;
  if (!elements) return;
  const uint64_t panels = grid.batches * grid.row_tiles() * grid.panels_of_band(panel_columns);
  const uint64_t threads = std::clamp<uint64_t>(std::min<uint64_t>(num_threads, elements / kLeast), 1, panels);
  Turns turns(panels, threads == 1 ? panels : std::max<uint64_t>(panels / (threads * kTurns), 1));
  std::vector<std::thread> others;
  others.reserve(threads);
  for (uint64_t i = 1; i < threads; ++i) others.emplace_back([&] { work(turns); });
  work(turns);
  for (auto& thread : others) thread.join();
}

}  // namespace

void quantize_tiles(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                    uint32_t num_threads, bool plain) {
  const auto kernel = find_kernels(plain).quantize;
  over_panels(grid, scalar::quantize_columns(grid), num_threads,
              [&](Turns& turns) { kernel(x, codes, scales, values, grid, format, turns); });
}

void dequantize_tiles(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                      uint32_t num_threads, bool plain) {
  const auto kernel = find_kernels(plain).dequantize;
  over_panels(grid, scalar::kDequantizeColumns, num_threads,
              [&](Turns& turns) { kernel(codes, scales, values, grid, format, turns); });
}

}  // namespace cofire
