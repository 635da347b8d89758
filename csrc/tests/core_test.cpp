// Runs the core under a sanitizer: threads as ranks over one segment, kernels over buffers of exact size.
//
//   cmake -S . -B build/tsan -DCOFIRE_SANITIZE=thread && cmake --build build/tsan && build/tsan/core_test
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <random>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
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

// A node's part of a collective of two nodes, as the engine drives it: the leader's threads go up and down beside `run`
// and start before it. The other node's sum of element i is i, so the result is known.
void run_between_nodes(uint32_t num_ranks) {
  constexpr int64_t kCalls = 20;
  const Layout layout{num_ranks, 1, 5, 4096};
  const uint64_t per_chunk = layout.slot_bytes / sizeof(int64_t);
  Memory memory(layout);
  std::vector<int64_t> names;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) names.push_back(rank);
  auto work = [&](uint32_t rank) {
    Segment segment(memory.bytes, rank, layout, names, std::chrono::microseconds(0));
    for (int64_t round = 0; round < kCalls; ++round) {
      const uint64_t count = 1 + (uint64_t(round) * 1231) % 9000, num_chunks = (count + per_chunk - 1) / per_chunk;
      const auto deadline = Clock::now() + std::chrono::seconds(60);
      std::vector<int64_t> data(count);
      for (uint64_t i = 0; i < count; ++i) data[i] = round * int64_t(i) + rank;
      Call call;
      call.kind = round % 3 == 2 ? Kind::reduce : Kind::all_reduce;
      call.root = call.kind == Kind::reduce ? int32_t(round) % int32_t(num_ranks) : 0;
      call.element = Element::i64;
      call.count = count;
      call.input = call.output = data.data();
      call.chunk_bytes = layout.slot_bytes;
      call.network = true;
      call.sends = rank == 0;
      call.deadline = deadline;
      std::vector<std::thread> exchange;
      std::atomic<uint64_t> exchanged{0};
      bool sent_right = true;
      if (rank == 0) {
        exchange.emplace_back([&] {
          for (uint64_t chunk = 0; chunk < num_chunks; ++chunk) {
            segment.wait_reduced(chunk, deadline);
            auto* sum = static_cast<int64_t*>(segment.result(0, segment.first_step() + chunk));
            for (uint64_t i = chunk * per_chunk; i < std::min(count, (chunk + 1) * per_chunk); ++i) sum[i % per_chunk] += int64_t(i);
            exchanged.store(chunk + 1);
            segment.mark_exchanged(chunk);
          }
        });
        exchange.emplace_back([&] {
          for (uint64_t chunk = 0; chunk < num_chunks; ++chunk) {
            while (exchanged.load() <= chunk) std::this_thread::yield();
            if (chunk % 2) std::this_thread::sleep_for(std::chrono::microseconds(300));
            const auto* sum = static_cast<const int64_t*>(segment.result(0, segment.first_step() + chunk));
            const int64_t at = int64_t(chunk * per_chunk), ranks = num_ranks;
            sent_right = sent_right && sum[0] == ranks * round * at + ranks * (ranks - 1) / 2 + at;
            segment.mark_sent(chunk);
          }
        });
      }
      segment.run(call);
      for (auto& thread : exchange) thread.join();
      bool good = true;
      for (uint64_t i = 0; i < count; ++i) {
        const int64_t at = int64_t(i), ranks = num_ranks;
        const bool has_result = call.kind == Kind::all_reduce || uint32_t(call.root) == rank;
        good = good && data[i] == (has_result ? ranks * round * at + ranks * (ranks - 1) / 2 + at : round * at + rank);
      }
      expect(good, "a collective of several nodes");
      expect(sent_right, "a result slot holds the result until it is sent");
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

// A rank does not come, and another thread gives up: whoever waits throws its message, now and in later calls.
void run_abort() {
  const Layout layout{3, 1, 4, 4096};
  Memory memory(layout);
  std::atomic<int> thrown{0};
  auto work = [&](uint32_t rank) {
    Segment segment(memory.bytes, rank, layout, {0, 1, 2}, std::chrono::microseconds(0));
    std::vector<float> data(5000);
    Call call;
    call.kind = Kind::all_reduce;
    call.count = data.size();
    call.input = call.output = data.data();
    call.deadline = Clock::now() + std::chrono::seconds(60);
    std::thread other;
    if (rank == 1) other = std::thread([&] { segment.abort("enough"); });
    for (int i = 0; i < 2; ++i) {
      try {
        segment.run(call);
      } catch (const CollectiveFailure& failure) {
        thrown += std::strcmp(failure.what(), "enough") == 0;
      }
    }
    if (rank == 1) other.join();
  };
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  expect(thrown == 4, "an abort is thrown on all ranks, with its message");
}

// A process dies in the middle: the survivor's file says so. Processes, since locks are theirs.
void run_death() {
  const Layout layout{2, 1, 4, 4096};
  char path[] = "/dev/shm/cofire-core-test-XXXXXX";
  const int file = mkstemp(path);
  if (file < 0 || ftruncate(file, off_t(layout.total_bytes())) != 0) return expect(false, "a file in /dev/shm");
  auto call_of = [](std::vector<float>& data) {
    Call call;
    call.kind = Kind::all_reduce;
    call.count = data.size();
    call.input = call.output = data.data();
    call.deadline = Clock::now() + std::chrono::seconds(60);
    return call;
  };
  std::vector<float> data(20000, 1.0f);
  const pid_t child = fork();
  if (child == 0) {
    Segment segment(open(path, O_RDWR), 1, layout, {4, 6}, std::chrono::microseconds(0));
    segment.run(call_of(data));
    kill(getpid(), SIGKILL);
  }
  std::string message;
  {
    Segment segment(file, 0, layout, {4, 6}, std::chrono::microseconds(0));
    try {
      segment.run(call_of(data));
      segment.run(call_of(data));
    } catch (const CollectiveFailure& failure) {
      message = failure.what();
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  unlink(path);
  expect(data[0] == 2.0f && WIFSIGNALED(status), "the rank that dies has taken part before");
  expect(message.find("rank 6 has gone during all_reduce of 20000 f32") == 0, "a dead rank is named");
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
  // A node of one rank exchanges its tensor without a segment.
  for (const uint32_t ranks : {2, 3, 4}) run_between_nodes(ranks);
  run_disagreement();
  run_abort();
  run_death();
  std::printf(failures ? "%d failed\n" : "core_test: all good\n", failures);
  return failures != 0;
}
