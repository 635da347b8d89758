// The shared-memory segment of the ranks of one node, and collectives over it.
//
// Each rank has a ring of slots, which it alone writes, and there is a ring of result slots, of which each rank writes
// its part. A chunk goes through three phases, each announced by a flag of each rank:
//   published  the rank's data of the chunk is in its slot;
//   reduced    the rank's part of the chunk's result is in the result slot;
//   consumed   the rank needs neither its peers' slots nor the result any more.
// Between nodes, a fourth flag says that the result slot holds the result over all nodes. A phase of chunk c runs beside
// earlier phases of later chunks, so that nobody waits for the other side of a chunk (Fire-Flyer, arXiv 2408.14158,
// IV-A). Lanes are rings of their own, so that several threads of a rank work without knowing each other.
//
// A rank holds a lock on a byte of the segment's file for as long as it lives: the kernel drops it however it dies.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/kernels.h"
#include "segment/wait.h"

namespace cofire {

enum class Kind : int32_t { barrier = 0, all_reduce = 1, reduce = 2, broadcast = 3, reduce_scatter = 4, all_gather = 5 };

// Ranks cannot finish together; the message says who and why.
struct CollectiveFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Layout {
  uint32_t num_ranks = 1;
  uint32_t num_lanes = 1;
  uint32_t num_slots = 4;
  uint64_t slot_bytes = 1 << 18;  // a multiple of the page size

  uint64_t total_bytes() const;
};

// What a rank is called for; all ranks must say the same.
struct Call {
  Kind kind = Kind::barrier;
  Element element = Element::f32;
  Op op = Op::sum;
  uint64_t count = 0;    // elements: of a rank's tensor; for reduce_scatter of the output, for all_gather of the input
  int32_t root = 0;      // local rank, for reduce and broadcast; -1: on another node
  double divisor = 1.0;  // for Op::average
  bool network = false;  // the result waits for the other nodes (all_reduce and reduce; one lane)
  bool sends = false;    // with network: this process sends the result slots, so they are in use until mark_sent
  bool stepped = false;  // the calls below from `begin` to `end`, instead of `run`
  const void* input = nullptr;
  void* output = nullptr;
  uint64_t chunk_bytes = 0;   // at most slot_bytes; 0: slot_bytes
  uint32_t num_lanes = 1;     // that work on it
  Clock::time_point deadline = Clock::time_point::max();
};

class Segment {
 public:
  // Maps the file; whoever creates it has made it `layout.total_bytes()` long and zero. `names` are the numbers by which
  // messages call the ranks.
  Segment(int file, uint32_t rank, Layout layout, std::vector<int64_t> names, std::chrono::nanoseconds spin);
  // Over memory that threads of one process share: nothing is mapped or locked, and every rank counts as alive.
  Segment(void* memory, uint32_t rank, Layout layout, std::vector<int64_t> names, std::chrono::nanoseconds spin);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Takes part in one collective; all ranks of the node call it. Throws CollectiveFailure.
  void run(const Call& call);

  // The same step by step, for an all_reduce or reduce whose data other means than the core's copies bring and fetch.
  // Between `begin` and `end`, for each chunk in ascending order: `wait_free`, then fill this rank's slot; `publish`;
  // `combine`; `wait_result`, then fetch the result slot; `consume`. Chunks may overtake each other by phases.
  void begin(const Call& call);
  void wait_free(const Call& call, uint64_t chunk);                // the slot may be written
  void publish(uint64_t chunk);
  void combine(const Call& call, uint64_t chunk, uint64_t count);  // this rank's part of all slots, once all are published
  void wait_result(const Call& call, uint64_t chunk);
  void consume(const Call& call, uint64_t chunk);
  void end(const Call& call, uint64_t num_chunks);

  // For who takes result slots through the other nodes, on another thread than `run`'s.
  void wait_reduced(uint64_t chunk, Clock::time_point deadline);   // by all ranks of the node
  void mark_exchanged(uint64_t chunk);                             // the result slot holds the result over all nodes
  void mark_sent(uint64_t chunk);                                  // the result slot was sent to the other nodes

  // Makes every rank's waits throw, now and later. The first message stays.
  void abort(const std::string& message);
  bool aborted() const;
  std::string abort_message() const;

  // Whether a rank's process is there.
  bool is_alive(uint32_t rank) const;

  void* memory() const { return base_; }
  void* slot(uint32_t lane, uint64_t step, uint32_t rank) const;
  void* result(uint32_t lane, uint64_t step) const;
  const Layout& layout() const { return layout_; }
  uint64_t first_step() const { return steps_[0]; }

  // Called about every 50 ms while the calling thread of `run` sleeps; may throw.
  std::function<void()> on_idle;

 private:
  struct Header;
  struct Control;
  struct Pass;

  Control& control(uint32_t rank) const;
  Flag& flag(uint32_t lane, uint32_t rank, int phase) const;
  Flag& exchanged(uint32_t lane) const;
  void await(Flag& flag, uint32_t target, uint32_t rank, const char* what, Clock::time_point deadline);
  void await_all(uint32_t lane, int phase, uint64_t step, const char* what, Clock::time_point deadline);
  std::string now() const;
  void describe(const Call& call);
  void compare_calls();
  void check_layout() const;
  void release(uint64_t taken, uint64_t sent);
  [[noreturn]] void fail(const std::string& message);
  void run_lane(const Call& call, uint32_t lane, uint64_t first, uint64_t count, bool checks);

  int file_;
  uint32_t rank_;
  Layout layout_;
  std::vector<int64_t> names_;
  std::chrono::nanoseconds spin_;
  char* base_ = nullptr;
  Header* header_ = nullptr;
  std::vector<uint64_t> steps_;  // chunks that went through each lane before this collective
  uint64_t calls_ = 0;
  std::mutex release_mutex_;
  uint64_t taken_ = 0, sent_ = 0;  // steps of lane 0 whose result was copied back, and sent on
  std::atomic<std::thread::id> caller_;  // who may run on_idle; threads of an exchange wait here too
  mutable std::mutex now_mutex_;
  std::string now_;  // what this rank is doing, for messages
};

}  // namespace cofire
