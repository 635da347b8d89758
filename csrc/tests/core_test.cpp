// Runs the core under a sanitizer: threads as ranks over one segment, kernels over buffers of exact size.
//
//   cmake -S . -B build/tsan -DCOFIRE_SANITIZE=thread && cmake --build build/tsan && build/tsan/core_test
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "segment/segment.h"

namespace {

using namespace cofire;
int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "failed: %s\n", what);
}

struct Memory {
  explicit Memory(const Layout& layout) : bytes(std::aligned_alloc(4096, layout.total_bytes())) {
    std::memset(bytes, 0, layout.total_bytes());
  }
  ~Memory() { std::free(bytes); }
  void* bytes;
};

// Every kind of collective, many times over, of sizes around the chunk's.
void run_ranks(uint32_t num_ranks, uint32_t num_lanes) {
  const Layout layout{num_ranks, num_lanes, 4, 4096};
  Memory memory(layout);
  std::vector<int64_t> names;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) names.push_back(rank);
  const std::vector<uint64_t> counts{0, 1, 63, 1023, 1024, 1025, 4099, 20011};
  auto work = [&](uint32_t rank) {
    Segment segment(memory.bytes, rank, layout, names, std::chrono::microseconds(rank % 2 ? 0 : 20));
    for (int round = 0; round < 3; ++round) {
      for (const uint64_t count : counts) {
        Call call;
        call.element = Element::i64;
        call.count = count;
        call.num_lanes = num_lanes;
        call.deadline = Clock::now() + std::chrono::seconds(60);
        auto value = [&](uint64_t i, uint32_t of) { return int64_t(i * 31 + of * 7 + round); };
        std::vector<int64_t> data(count), wide(count * num_ranks);
        auto fill = [&] {
          for (uint64_t i = 0; i < count; ++i) data[i] = value(i, rank);
          for (uint64_t i = 0; i < count * num_ranks; ++i) wide[i] = value(i, rank);
        };
        auto sum = [&](uint64_t i) {
          int64_t total = 0;
          for (uint32_t of = 0; of < num_ranks; ++of) total += value(i, of);
          return total;
        };
        bool good = true;
        fill();
        call.kind = Kind::all_reduce;
        call.input = call.output = data.data();
        segment.run(call);
        for (uint64_t i = 0; i < count; ++i) good = good && data[i] == sum(i);
        expect(good, "all_reduce");
        fill();
        call.kind = Kind::reduce;
        call.root = int32_t(count % num_ranks);
        segment.run(call);
        for (uint64_t i = 0; i < count; ++i) good = good && data[i] == (uint32_t(call.root) == rank ? sum(i) : value(i, rank));
        expect(good, "reduce");
        fill();
        call.kind = Kind::broadcast;
        segment.run(call);
        for (uint64_t i = 0; i < count; ++i) good = good && data[i] == value(i, call.root);
        expect(good, "broadcast");
        fill();
        call.kind = Kind::reduce_scatter;
        call.input = wide.data();
        call.output = data.data();
        segment.run(call);
        for (uint64_t i = 0; i < count; ++i) good = good && data[i] == sum(rank * count + i);
        expect(good, "reduce_scatter");
        fill();
        call.kind = Kind::all_gather;
        call.input = data.data();
        call.output = wide.data();
        segment.run(call);
        for (uint64_t i = 0; i < count * num_ranks; ++i) good = good && wide[i] == value(i % count, uint32_t(i / count));
        expect(good, "all_gather");
      }
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) threads.emplace_back(work, rank);
  for (auto& thread : threads) thread.join();
}

// One rank calls something else: all of them throw.
void run_disagreement() {
  const Layout layout{3, 1, 4, 4096};
  Memory memory(layout);
  std::atomic<int> thrown{0};
  auto work = [&](uint32_t rank) {
    Segment segment(memory.bytes, rank, layout, {0, 1, 2}, std::chrono::microseconds(0));
    std::vector<float> data(5000);
    Call call;
    call.kind = Kind::all_reduce;
    call.count = rank == 1 ? 5000 : 4999;
    call.input = call.output = data.data();
    call.deadline = Clock::now() + std::chrono::seconds(60);
    try {
      segment.run(call);
    } catch (const CollectiveFailure&) {
      ++thrown;
    }
  };
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < 3; ++rank) threads.emplace_back(work, rank);
  for (auto& thread : threads) thread.join();
  expect(thrown == 3, "a disagreement is thrown on all ranks");
}

// All kernels, over heap blocks that end where the data ends.
void run_kernels() {
  std::mt19937 random(7);
  for (int e = 0; e < 8; ++e) {
    const auto element = static_cast<Element>(e);
    for (int o = 0; o < 8; ++o) {
      const auto op = static_cast<Op>(o);
      if (!is_supported(element, op)) continue;
      for (const size_t count : {0, 1, 3, 8, 15, 16, 17, 33, 127, 1009}) {
        for (const size_t num_sources : {1, 2, 3, 5}) {
          const size_t bytes = count * element_size(element);
          std::vector<std::unique_ptr<unsigned char[]>> blocks;
          std::vector<const void*> sources;
          for (size_t s = 0; s < num_sources; ++s) {
            blocks.push_back(std::make_unique<unsigned char[]>(bytes));
            for (size_t i = 0; i < bytes; ++i) blocks.back()[i] = static_cast<unsigned char>(random());
            sources.push_back(blocks.back().get());
          }
          auto slow = std::make_unique<unsigned char[]>(bytes), fast = std::make_unique<unsigned char[]>(bytes);
          reduce(Isa::scalar, element, op, slow.get(), sources.data(), num_sources, count, 3.0);
          for (const Isa isa : {Isa::avx2, Isa::avx512}) {
            if (!has_isa(isa)) continue;
            reduce(isa, element, op, fast.get(), sources.data(), num_sources, count, 3.0);
            expect(!bytes || std::memcmp(slow.get(), fast.get(), bytes) == 0, "a kernel differs from the scalar one");
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  run_kernels();
  for (const uint32_t ranks : {1, 2, 3, 4}) run_ranks(ranks, 1);
  run_ranks(2, 2);
  run_ranks(3, 2);
  run_disagreement();
  std::printf(failures ? "%d failed\n" : "core_test: all good\n", failures);
  return failures != 0;
}
