// What threads have to do, by index; each takes some in its turn, so that one that starts late on a busy machine does less.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace cofire {

class Turns {
 public:
  Turns(uint64_t count, uint64_t some) : count_(count), some_(some) {}
  uint64_t count() const { return count_; }

 private:
  friend class Turn;
  std::atomic<uint64_t> next_ = 0;
  const uint64_t count_, some_;
};

// One thread's view of it.
class Turn {
 public:
  explicit Turn(Turns& turns) : turns_(turns) {}

  // The next index that is this thread's; the count where none are left.
  uint64_t take() {
    if (next_ == last_) {
      next_ = std::min(turns_.next_.fetch_add(turns_.some_, std::memory_order_relaxed), turns_.count_);
      last_ = std::min(next_ + turns_.some_, turns_.count_);
    }
    return next_ < last_ ? next_++ : turns_.count_;
  }

 private:
  Turns& turns_;
  uint64_t next_ = 0, last_ = 0;
};

}  // namespace cofire
