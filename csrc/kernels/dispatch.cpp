// Which variant runs, and under which floating-point mode.
#include "kernels/variants.h"

#ifdef COFIRE_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace cofire {
namespace {

// The processor's default mode while it lives: round to nearest even, denormals kept, no traps.
class DefaultMode {
 public:
  DefaultMode(const DefaultMode&) = delete;
  DefaultMode& operator=(const DefaultMode&) = delete;
#if defined(COFIRE_X86)
  DefaultMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}) : "memory");
  }
  ~DefaultMode() { asm volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }

 private:
  uint64_t saved_;
#else
  DefaultMode() {}
#endif
};

#ifdef COFIRE_X86
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// The builtins ask the operating system too, whether it saves the wide registers.
bool find_isa(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

size_t element_size(Element element) {
  switch (element) {
    case Element::f64:
    case Element::i64:
      return 8;
    case Element::f32:
    case Element::i32:
      return 4;
    case Element::f16:
    case Element::bf16:
      return 2;
    case Element::e4m3:
    case Element::e5m2:
      return 1;
  }
  return 0;
}

bool is_supported(Element element, Op op) {
  if (element_size(element) == 0 || op < Op::sum || op > Op::bit_xor) return false;
  return op < Op::bit_and || element == Element::i32 || element == Element::i64;
}

bool has_isa(Isa isa) {
#ifdef COFIRE_X86
  static const bool avx2 = find_isa(Isa::avx2), avx512 = find_isa(Isa::avx512);
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
#endif
  return isa == Isa::scalar;
}

Isa best_isa() {
  if (has_isa(Isa::avx512)) return Isa::avx512;
  return has_isa(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

void reduce(Isa isa, Element element, Op op, void* target, const void* const* sources, size_t num_sources, size_t count,
            double divisor) {
  const size_t size_bytes = count * element_size(element);
  const Task task{element, op, target, sources, num_sources, size_bytes, op == Op::average ? divisor : 1.0};
  const DefaultMode mode;
#ifdef COFIRE_X86
  if (isa == Isa::avx512) return reduce_avx512(task);
  if (isa == Isa::avx2) return reduce_avx2(task);
#endif
  static_cast<void>(isa);
  reduce_scalar(task);
}

}  // namespace cofire
