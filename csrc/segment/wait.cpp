#include "segment/wait.h"

#include <climits>
#include <ctime>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace cofire {
namespace {

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  // Not FUTEX_PRIVATE: the word lies in memory that several processes map.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

}  // namespace

void Flag::raise(uint32_t to) {
  // Sequentially consistent, so that a waiter who has said so is seen, or sees the new value.
  value.store(to, std::memory_order_seq_cst);
  if (waiters.load(std::memory_order_seq_cst) != 0) wake();
}

void Flag::wake() { futex(&value, FUTEX_WAKE, INT_MAX, nullptr); }

bool Flag::wait(uint32_t target, std::chrono::nanoseconds spin, std::chrono::nanoseconds slice) {
  if (has(target)) return true;
  if (spin.count() > 0) {
    const auto until = Clock::now() + spin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (has(target)) return true;
        pause_core();
      }
    } while (Clock::now() < until);
  }
  waiters.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = value.load(std::memory_order_seq_cst);
  if (static_cast<int32_t>(seen - target) < 0) {
    const timespec limit{static_cast<time_t>(slice.count() / 1'000'000'000), static_cast<long>(slice.count() % 1'000'000'000)};
    futex(&value, FUTEX_WAIT, seen, &limit);
  }
  waiters.fetch_sub(1, std::memory_order_seq_cst);
  return has(target);
}

}  // namespace cofire
