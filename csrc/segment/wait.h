// A flag in shared memory: a counter that one process raises and others wait for, by a spin and then by a futex.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace cofire {

using Clock = std::chrono::steady_clock;

// One cache line pair of its own, since its writer and its readers are on different cores.
struct alignas(128) Flag {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> waiters{0};

  // Counters wrap around; what is compared is less than 2^31 apart.
  bool has(uint32_t target) const {
    return static_cast<int32_t>(value.load(std::memory_order_acquire) - target) >= 0;
  }

  // Raises the counter and wakes who sleeps on it.
  void raise(uint32_t to);

  // Wakes who sleeps on it, so that they look at what else may have happened.
  void wake();

  // Spins for `spin`, then sleeps for at most `slice`; true once the counter has come to the target.
  bool wait(uint32_t target, std::chrono::nanoseconds spin, std::chrono::nanoseconds slice);
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "flags are shared between processes");

}  // namespace cofire
