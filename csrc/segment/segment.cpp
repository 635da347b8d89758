#include "segment/segment.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

#include "segment/copy.h"

namespace cofire {
namespace {

constexpr uint64_t kPage = 4096;
constexpr std::chrono::milliseconds kSlice{50};
constexpr uint32_t kMaxRanks = 1024;
enum Phase { kPublished = 0, kReduced = 1, kConsumed = 2, kNumPhases = 3 };

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

const char* name_of(Kind kind) {
  constexpr const char* names[] = {"barrier", "all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather"};
  return names[static_cast<int>(kind)];
}

const char* name_of(Element element) {
  constexpr const char* names[] = {"f32", "f64", "f16", "bf16", "e4m3", "e5m2", "i32", "i64"};
  return names[static_cast<int>(element)];
}

const char* name_of(Op op) {
  constexpr const char* names[] = {"sum", "average", "product", "min", "max", "bitwise and", "bitwise or", "bitwise xor"};
  return names[static_cast<int>(op)];
}

bool adds(Kind kind) { return kind == Kind::all_reduce || kind == Kind::reduce || kind == Kind::reduce_scatter; }

struct Description {
  uint64_t number, count;
  Kind kind;
  Element element;
  Op op;
  int32_t root;
  double divisor;
  uint32_t num_lanes, network, stepped;

  bool operator==(const Description&) const = default;

  std::string text() const {
    std::string out = name_of(kind);
    if (kind == Kind::barrier) return out;
    out += " of " + std::to_string(count) + " " + name_of(element);
    if (adds(kind)) out += std::string(" (") + name_of(op) + ")";
    if (kind == Kind::reduce || kind == Kind::broadcast) out += " with root " + std::to_string(root);
    if (stepped) out += " on a device";
    return out;
  }
};

}  // namespace

struct Segment::Header {
  std::atomic<uint32_t> aborted;  // 0 no, 1 the message is being written, 2 yes
  char message[1020];
};

struct alignas(128) Segment::Control {
  std::atomic<uint32_t> came;  // 1 once the rank has mapped the segment and holds its lock
  Description calls[2];  // of even and of odd calls: a rank is at most one call ahead of who still reads
};

uint64_t Layout::total_bytes() const {
  const uint64_t control = kPage + round_up(num_ranks * uint64_t{1024}, kPage);
  const uint64_t flags = round_up(num_lanes * (num_ranks * uint64_t{kNumPhases} + 1) * sizeof(Flag), kPage);
  return control + flags + uint64_t{num_lanes} * (num_ranks + 1) * num_slots * slot_bytes;
}

Segment::Segment(int file, uint32_t rank, Layout layout, std::vector<int64_t> names, std::chrono::nanoseconds spin)
    : file_(file), rank_(rank), layout_(layout), names_(std::move(names)), spin_(spin), steps_(layout.num_lanes, 0) {
  static_assert(sizeof(Header) <= kPage && sizeof(Control) <= 1024);
  check_layout();
  void* base = mmap(nullptr, layout.total_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
  if (base == MAP_FAILED) throw std::runtime_error(std::string("cannot map the segment: ") + std::strerror(errno));
  base_ = static_cast<char*>(base);
  madvise(base, layout.total_bytes(), MADV_HUGEPAGE);  // where the kernel gives shared memory huge pages
  header_ = reinterpret_cast<Header*>(base_);
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank_;
  lock.l_len = 1;
  if (fcntl(file_, F_SETLK, &lock) != 0) {
    munmap(base_, layout_.total_bytes());
    throw std::runtime_error("rank " + std::to_string(names_[rank_]) + " is there twice: its byte of the segment is locked");
  }
  control(rank_).came.store(1);
}

Segment::Segment(void* memory, uint32_t rank, Layout layout, std::vector<int64_t> names, std::chrono::nanoseconds spin)
    : file_(-1), rank_(rank), layout_(layout), names_(std::move(names)), spin_(spin), steps_(layout.num_lanes, 0) {
  check_layout();
  base_ = static_cast<char*>(memory);
  header_ = reinterpret_cast<Header*>(base_);
}

Segment::~Segment() {
  if (file_ < 0) return;
  munmap(base_, layout_.total_bytes());
  close(file_);
}

void Segment::check_layout() const {
  if (layout_.num_ranks < 1 || layout_.num_ranks > kMaxRanks || rank_ >= layout_.num_ranks || names_.size() != layout_.num_ranks)
    throw std::invalid_argument("a segment has 1 to 1024 ranks, each with a name");
  if (layout_.num_slots < 3 || layout_.num_lanes < 1 || layout_.slot_bytes < kPage || layout_.slot_bytes % kPage)
    throw std::invalid_argument("a segment has 3 slots or more, of whole pages");
}

Segment::Control& Segment::control(uint32_t rank) const {
  return *reinterpret_cast<Control*>(base_ + kPage + rank * uint64_t{1024});
}

Flag& Segment::flag(uint32_t lane, uint32_t rank, int phase) const {
  char* flags = base_ + kPage + round_up(layout_.num_ranks * uint64_t{1024}, kPage);
  const uint64_t index = lane * (layout_.num_ranks * uint64_t{kNumPhases} + 1) + rank * uint64_t{kNumPhases} + phase;
  return reinterpret_cast<Flag*>(flags)[index];
}

Flag& Segment::exchanged(uint32_t lane) const { return flag(lane, layout_.num_ranks, 0); }

void* Segment::slot(uint32_t lane, uint64_t step, uint32_t rank) const {
  const uint64_t slots = uint64_t{layout_.num_lanes} * (layout_.num_ranks + 1) * layout_.num_slots * layout_.slot_bytes;
  char* first = base_ + layout_.total_bytes() - slots;
  const uint64_t ring = lane * uint64_t{layout_.num_ranks + 1} + rank;
  return first + (ring * layout_.num_slots + step % layout_.num_slots) * layout_.slot_bytes;
}

void* Segment::result(uint32_t lane, uint64_t step) const { return slot(lane, step, layout_.num_ranks); }

bool Segment::is_alive(uint32_t rank) const {
  // A process does not see its own locks; and who has not come yet is waited for.
  if (rank == rank_ || file_ < 0 || !control(rank).came.load()) return true;
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(file_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

void Segment::abort(const std::string& message) {
  uint32_t expected = 0;
  if (header_->aborted.compare_exchange_strong(expected, 1)) {
    std::snprintf(header_->message, sizeof(header_->message), "%s", message.c_str());
    header_->aborted.store(2);
  }
  for (uint32_t lane = 0; lane < layout_.num_lanes; ++lane) {
    for (uint32_t rank = 0; rank < layout_.num_ranks; ++rank)
      for (int phase = 0; phase < kNumPhases; ++phase) flag(lane, rank, phase).wake();
    exchanged(lane).wake();
  }
}

bool Segment::aborted() const { return header_->aborted.load() != 0; }

std::string Segment::abort_message() const {
  // Whoever claimed the message may have died while it wrote.
  for (int i = 0; i < 100 && header_->aborted.load() == 1; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (header_->aborted.load() != 2) return "a rank died while it reported a failure";
  return header_->message;
}

void Segment::fail(const std::string& message) {
  abort(message);
  throw CollectiveFailure(abort_message());
}

void Segment::await(Flag& flag, uint32_t target, uint32_t rank, const char* what, Clock::time_point deadline) {
  if (flag.has(target)) return;
  auto spin = spin_;
  while (true) {
    const auto left = deadline - Clock::now();
    const auto slice = std::clamp<std::chrono::nanoseconds>(left, std::chrono::microseconds(100), kSlice);
    if (flag.wait(target, spin, slice)) return;
    spin = std::chrono::nanoseconds(0);
    if (aborted()) throw CollectiveFailure(abort_message());
    if (on_idle && std::this_thread::get_id() == caller_.load()) on_idle();
    const std::string name = rank < layout_.num_ranks ? "rank " + std::to_string(names_[rank]) : "the exchange between nodes";
    if (rank < layout_.num_ranks && !is_alive(rank) && !flag.has(target)) fail(name + " has gone during " + now());
    if (Clock::now() >= deadline) fail(name + " has not " + what + " in time in " + now() + "; it may be stuck, or the timeout too short");
  }
}

void Segment::await_all(uint32_t lane, int phase, uint64_t step, const char* what, Clock::time_point deadline) {
  for (uint32_t rank = 0; rank < layout_.num_ranks; ++rank)
    if (rank != rank_) await(flag(lane, rank, phase), static_cast<uint32_t>(step), rank, what, deadline);
}

std::string Segment::now() const {
  const std::lock_guard lock(now_mutex_);
  return now_;
}

void Segment::describe(const Call& call) {
  if (aborted()) throw CollectiveFailure(abort_message());
  Description& mine = control(rank_).calls[calls_ % 2];
  mine = {calls_, call.count, call.kind, call.element, call.op, call.root, call.divisor, call.num_lanes, call.network,
          call.stepped};
  const std::lock_guard lock(now_mutex_);
  now_ = mine.text();
}

// After all ranks have published the first chunk of the call.
void Segment::compare_calls() {
  auto said = [this](uint32_t rank) -> const Description& {
    return control(rank).calls[calls_ % 2];
  };
  bool same = true;
  for (uint32_t rank = 1; rank < layout_.num_ranks; ++rank) same = same && said(rank) == said(0);
  if (same) return;
  // Every rank sees all descriptions, so every rank says the same.
  std::string message = "ranks disagree:";
  for (uint32_t rank = 0; rank < layout_.num_ranks; ++rank) {
    if (rank && said(rank) == said(rank - 1) && rank + 1 < layout_.num_ranks) continue;
    message += (rank ? "; rank " : " rank ") + std::to_string(names_[rank]) + " calls " + said(rank).text();
  }
  fail(message + "; call the same on all ranks, in the same order");
}

// Where the chunks of one call lie in tensors and slots, for one lane.
struct Segment::Pass {
  struct Part {
    uint64_t slot_at, tensor_at, count;  // elements
  };

  const Call& call;
  uint32_t num_ranks, rank;
  uint64_t size, first, count, per_chunk, num_chunks;
  bool whole;  // each rank reduces all of the chunk by itself: one hand-over, more reading

  Pass(const Call& call, const Layout& layout, uint32_t rank, uint64_t first, uint64_t count)
      : call(call), num_ranks(layout.num_ranks), rank(rank), size(element_size(call.element)), first(first), count(count) {
    const uint64_t bytes = call.chunk_bytes ? std::min(call.chunk_bytes, layout.slot_bytes) : layout.slot_bytes;
    // A slot of a reduce_scatter holds a piece for each rank.
    const uint64_t shares = call.kind == Kind::reduce_scatter ? num_ranks : 1;
    per_chunk = std::max<uint64_t>(1, bytes / size / shares);
    if (per_chunk * size >= 64) per_chunk -= per_chunk % (64 / size);
    num_chunks = std::max<uint64_t>(1, (count + per_chunk - 1) / per_chunk);
    constexpr uint64_t kSmall = 32768;
    whole = call.kind == Kind::all_reduce && !call.network && (num_ranks == 2 || count * size <= kSmall);
  }

  uint64_t start(uint64_t chunk) const { return chunk * per_chunk; }
  uint64_t length(uint64_t chunk) const { return count - std::min(count, start(chunk)) < per_chunk ? count - start(chunk) : per_chunk; }

  // The part of a chunk that a rank reduces.
  Part part(uint64_t chunk, uint32_t of) const {
    const uint64_t n = length(chunk), at = first + start(chunk);
    if (call.kind == Kind::reduce_scatter) return {of * per_chunk, of * call.count + at, n};
    const uint64_t each = round_up((n + num_ranks - 1) / num_ranks, 64 / size);
    const uint64_t from = std::min(n, of * each), to = std::min(n, from + each);
    return {from, at + from, to - from};
  }

  const char* input(uint64_t element) const { return static_cast<const char*>(call.input) + element * size; }
  char* output(uint64_t element) const { return static_cast<char*>(call.output) + element * size; }
};

void Segment::run_lane(const Call& call, uint32_t lane, uint64_t first, uint64_t count, bool checks) {
  const Pass pass(call, layout_, rank_, first, count);
  const uint32_t n = layout_.num_ranks;
  const Isa isa = best_isa();
  const uint64_t base = steps_[lane], size = pass.size;
  const bool sums = adds(call.kind);
  std::vector<const void*> sources(n);
  auto at = [&](uint64_t step, uint32_t rank) { return static_cast<char*>(slot(lane, step, rank)); };

  auto publish = [&](uint64_t chunk) {
    const uint64_t step = base + chunk;
    if (step >= layout_.num_slots) await_all(lane, kConsumed, step + 1 - layout_.num_slots, "consumed", call.deadline);
    char* mine = at(step, rank_);
    if (sums) {
      // The rank's own part stays where it is, unless peers reduce it too.
      for (uint32_t of = 0; of < n; ++of) {
        if (of == rank_ && !pass.whole) continue;
        const auto part = pass.part(chunk, of);
        copy_bytes(mine + part.slot_at * size, pass.input(part.tensor_at), part.count * size);
      }
    } else if (call.kind == Kind::all_gather || (call.kind == Kind::broadcast && uint32_t(call.root) == rank_)) {
      copy_bytes(mine, pass.input(pass.first + pass.start(chunk)), pass.length(chunk) * size);
    }
    flag(lane, rank_, kPublished).raise(static_cast<uint32_t>(step + 1));
  };
  auto combine = [&](uint64_t chunk) {
    const uint64_t step = base + chunk;
    if (sums || call.kind == Kind::all_gather || chunk == 0) {
      await_all(lane, kPublished, step + 1, "come", call.deadline);
    } else if (call.kind == Kind::broadcast && uint32_t(call.root) != rank_) {
      await(flag(lane, call.root, kPublished), uint32_t(step + 1), call.root, "sent", call.deadline);
    }
    if (chunk == 0 && checks) compare_calls();
    if (!sums) return;
    const uint64_t start = pass.first + pass.start(chunk);
    auto part = pass.part(chunk, rank_);
    if (pass.whole) part = {0, start, pass.length(chunk)};
    for (uint32_t rank = 0; rank < n; ++rank)
      sources[rank] = rank == rank_ ? pass.input(part.tensor_at) : at(step, rank) + part.slot_at * size;
    char* target = static_cast<char*>(result(lane, step)) + part.slot_at * size;
    if (pass.whole || call.kind == Kind::reduce_scatter) target = pass.output(start);
    if (part.count) reduce(isa, call.element, call.op, target, sources.data(), n, part.count, call.divisor);
    if (!pass.whole && call.kind != Kind::reduce_scatter) flag(lane, rank_, kReduced).raise(static_cast<uint32_t>(step + 1));
  };
  auto take = [&](uint64_t chunk) {
    const uint64_t step = base + chunk, start = pass.first + pass.start(chunk), bytes = pass.length(chunk) * size;
    if (call.network && sums) {
      await(exchanged(lane), static_cast<uint32_t>(step + 1), n, "ended", call.deadline);
    } else if (sums && !pass.whole && call.kind != Kind::reduce_scatter) {
      await_all(lane, kReduced, step + 1, "reduced its part", call.deadline);
    }
    const bool is_root = uint32_t(call.root) == rank_;
    if ((call.kind == Kind::all_reduce && !pass.whole) || (call.kind == Kind::reduce && is_root)) {
      copy_bytes(pass.output(start), result(lane, step), bytes);
    } else if (call.kind == Kind::broadcast) {
      copy_bytes(pass.output(start), is_root ? pass.input(start) : at(step, call.root), bytes);
    } else if (call.kind == Kind::all_gather) {
      for (uint32_t rank = 0; rank < n; ++rank)
        copy_bytes(pass.output(rank * call.count + start), rank == rank_ ? pass.input(start) : at(step, rank), bytes);
    }
    if (call.sends) {
      release(step + 1, 0);
    } else {
      flag(lane, rank_, kConsumed).raise(static_cast<uint32_t>(step + 1));
    }
  };

  // Chunk i is published while chunk i - 1 is reduced and an earlier one is taken back.
  const uint64_t ahead = call.network ? layout_.num_slots - 1 : 2;
  for (uint64_t i = 0; i < pass.num_chunks + ahead; ++i) {
    if (i < pass.num_chunks) publish(i);
    if (i >= 1 && i - 1 < pass.num_chunks) combine(i - 1);
    if (i >= ahead) take(i - ahead);
  }
  // What other threads say of this call's chunks counts from its first step, so they must be through with it.
  if (call.sends)
    await(flag(lane, rank_, kConsumed), static_cast<uint32_t>(base + pass.num_chunks), n, "sent everything", call.deadline);
  steps_[lane] = base + pass.num_chunks;
}

// Of lane 0: a result slot that this process sends is free once it has been both copied back and sent.
void Segment::release(uint64_t taken, uint64_t sent) {
  const std::lock_guard lock(release_mutex_);
  taken_ = std::max(taken_, taken);
  sent_ = std::max(sent_, sent);
  flag(0, rank_, kConsumed).raise(static_cast<uint32_t>(std::min(taken_, sent_)));
}

void Segment::mark_sent(uint64_t chunk) { release(0, steps_[0] + chunk + 1); }

void Segment::run(const Call& call) {
  describe(call);
  caller_ = std::this_thread::get_id();
  taken_ = sent_ = steps_[0];
  const uint32_t lanes = std::clamp<uint32_t>(call.num_lanes, 1, layout_.num_lanes);
  const uint64_t unit = 64 / std::max<uint64_t>(1, element_size(call.element));
  const uint64_t share = round_up((call.count + lanes - 1) / lanes, std::max<uint64_t>(1, unit));
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(lanes);
  auto work = [&](uint32_t lane) {
    try {
      const uint64_t first = std::min<uint64_t>(call.count, lane * share);
      run_lane(call, lane, first, std::min(call.count - first, share), lane == 0);
    } catch (const std::exception& error) {
      errors[lane] = std::current_exception();
      abort(error.what());  // the other lanes must not wait for this one
    } catch (...) {
      errors[lane] = std::current_exception();
      abort("rank " + std::to_string(names_[rank_]) + " was interrupted during " + now());
    }
  };
  for (uint32_t lane = 1; lane < lanes; ++lane) threads.emplace_back(work, lane);
  work(0);
  for (auto& thread : threads) thread.join();
  ++calls_;
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

void Segment::begin(const Call& call) {
  describe(call);
  caller_ = std::this_thread::get_id();
  taken_ = sent_ = steps_[0];
}

void Segment::wait_free(const Call& call, uint64_t chunk) {
  const uint64_t step = steps_[0] + chunk;
  if (step >= layout_.num_slots) await_all(0, kConsumed, step + 1 - layout_.num_slots, "consumed", call.deadline);
}

void Segment::publish(uint64_t chunk) { flag(0, rank_, kPublished).raise(uint32_t(steps_[0] + chunk + 1)); }

void Segment::combine(const Call& call, uint64_t chunk, uint64_t count) {
  const uint64_t step = steps_[0] + chunk, size = element_size(call.element);
  await_all(0, kPublished, step + 1, "come", call.deadline);
  if (chunk == 0) compare_calls();
  const uint64_t each = round_up((count + layout_.num_ranks - 1) / layout_.num_ranks, 64 / size);
  const uint64_t from = std::min(count, rank_ * each), part = std::min(count, from + each) - from;
  std::vector<const void*> sources(layout_.num_ranks);
  for (uint32_t rank = 0; rank < layout_.num_ranks; ++rank) sources[rank] = static_cast<char*>(slot(0, step, rank)) + from * size;
  void* target = static_cast<char*>(result(0, step)) + from * size;
  if (part) reduce(best_isa(), call.element, call.op, target, sources.data(), layout_.num_ranks, part, call.divisor);
  flag(0, rank_, kReduced).raise(uint32_t(step + 1));
}

void Segment::wait_reduced(uint64_t chunk, Clock::time_point deadline) {
  for (uint32_t rank = 0; rank < layout_.num_ranks; ++rank)
    await(flag(0, rank, kReduced), uint32_t(steps_[0] + chunk + 1), rank, "reduced its part", deadline);
}

void Segment::mark_exchanged(uint64_t chunk) { exchanged(0).raise(uint32_t(steps_[0] + chunk + 1)); }

void Segment::wait_result(const Call& call, uint64_t chunk) {
  if (call.network) {
    await(exchanged(0), uint32_t(steps_[0] + chunk + 1), layout_.num_ranks, "ended", call.deadline);
  } else {
    await_all(0, kReduced, steps_[0] + chunk + 1, "reduced its part", call.deadline);
  }
}

void Segment::consume(const Call& call, uint64_t chunk) {
  const uint64_t step = steps_[0] + chunk;
  if (call.sends) {
    release(step + 1, 0);
  } else {
    flag(0, rank_, kConsumed).raise(static_cast<uint32_t>(step + 1));
  }
}

void Segment::end(const Call& call, uint64_t num_chunks) {
  const auto last = static_cast<uint32_t>(steps_[0] + num_chunks);
  if (call.sends) await(flag(0, rank_, kConsumed), last, layout_.num_ranks, "sent everything", call.deadline);
  steps_[0] += num_chunks;
  ++calls_;
}

}  // namespace cofire
