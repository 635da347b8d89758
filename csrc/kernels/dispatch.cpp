#include "kernels/kernels.h"

#include <algorithm>
#include <vector>

#include "kernels/variants.h"
#ifdef COFIRE_X86
#include <immintrin.h>
#endif

namespace cofire {
namespace {

// Round to nearest, denormals kept, whatever the calling thread has set (torch.set_flush_denormal); restored at the end.
class DefaultRounding {
 public:
#ifdef COFIRE_X86
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

}  // namespace

size_t element_size(Element element) {
  constexpr size_t sizes[] = {4, 8, 2, 2, 1, 1, 4, 8};
  const auto number = static_cast<int32_t>(element);
  return number >= 0 && number < 8 ? sizes[number] : 0;
}

bool is_supported(Element element, Op op) {
  const auto number = static_cast<int32_t>(op);
  if (!element_size(element) || number < 0 || number > static_cast<int32_t>(Op::bit_xor)) return false;
  return op < Op::bit_and || element == Element::i32 || element == Element::i64;
}

bool has_isa(Isa isa) {
  if (isa == Isa::scalar) return true;
#ifdef COFIRE_X86
  __builtin_cpu_init();
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
#endif
  return false;
}

Isa best_isa() {
  static const Isa best = has_isa(Isa::avx512) ? Isa::avx512 : has_isa(Isa::avx2) ? Isa::avx2 : Isa::scalar;
  return best;
}

void reduce(Isa isa, Element element, Op op, void* target, const void* const* sources, size_t num_sources, size_t count,
            double divisor) {
  const DefaultRounding guard;
  char* to = static_cast<char*>(target);
  std::vector<const char*> from(num_sources);
  std::transform(sources, sources + num_sources, from.begin(), [](const void* s) { return static_cast<const char*>(s); });
  size_t done = 0;
#ifdef COFIRE_X86
  if (isa == Isa::avx512) done = reduce_avx512(element, op, to, from.data(), num_sources, count, divisor);
  if (isa == Isa::avx2) done = reduce_avx2(element, op, to, from.data(), num_sources, count, divisor);
#else
  (void)isa;
#endif
  if (done == count) return;
  // What no vector holds: the same bits, one by one.
  const size_t at = done * element_size(element);
  for (auto& source : from) source += at;
  reduce_scalar(element, op, to + at, from.data(), num_sources, count - done, divisor);
}

}  // namespace cofire
