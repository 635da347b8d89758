#define COFIRE_VARIANT scalar
#include "quantize/tiles_generic.h"

#include <exception>
#include <thread>
#include <vector>

namespace cofire {

#ifdef COFIRE_X86
namespace avx2 {
void quantize_bands(const float*, uint8_t*, void*, float*, const TileGrid&, const TileFormat&, uint64_t, uint64_t);
void dequantize_bands(const uint8_t*, const void*, float*, const TileGrid&, const TileFormat&, uint64_t, uint64_t);
}  // namespace avx2
#endif

namespace {

bool has_avx2() {
#ifdef COFIRE_X86
  static const bool found = __builtin_cpu_supports("avx2");
  return found;
#else
  return false;
#endif
}

// Splits the bands among threads; starting one costs more than a small matrix does.
template <typename Work>
void over_bands(const TileGrid& grid, uint32_t num_threads, const Work& work) {
  constexpr uint64_t kLeast = 1 << 17;
  const uint64_t bands = grid.batches * grid.row_tiles(), elements = grid.batches * grid.rows * grid.columns;
  if (!elements) return;
  const uint64_t threads = std::clamp<uint64_t>(std::min<uint64_t>(num_threads, elements / kLeast), 1, bands);
  std::vector<std::thread> others;
  others.reserve(threads);
  const auto share = [&](uint64_t i) { work(bands * i / threads, bands * (i + 1) / threads); };
  for (uint64_t i = 1; i < threads; ++i) others.emplace_back(share, i);
  share(0);
  for (auto& thread : others) thread.join();
}

}  // namespace

void quantize_tiles(const float* x, uint8_t* codes, void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                    uint32_t num_threads) {
  auto kernel = scalar::quantize_bands;
#ifdef COFIRE_X86
  if (has_avx2()) kernel = avx2::quantize_bands;
#endif
  over_bands(grid, num_threads, [&](uint64_t first, uint64_t last) { kernel(x, codes, scales, values, grid, format, first, last); });
}

void dequantize_tiles(const uint8_t* codes, const void* scales, float* values, const TileGrid& grid, const TileFormat& format,
                      uint32_t num_threads) {
  auto kernel = scalar::dequantize_bands;
#ifdef COFIRE_X86
  if (has_avx2()) kernel = avx2::dequantize_bands;
#endif
  over_bands(grid, num_threads, [&](uint64_t first, uint64_t last) { kernel(codes, scales, values, grid, format, first, last); });
}

}  // namespace cofire
