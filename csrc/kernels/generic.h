// The kernel, once for all instruction sets: a template over vector types of the compiler's vector extension.
//
// Each translation unit that includes this is compiled for another instruction set, so everything here has internal
// linkage (the unnamed namespace) and calls nothing from the standard library that the linker might share between them.
//
// A variant V says how wide it is and may have faster ways than the integer routines below:
//   width               lanes of 32 bits
//   F, S, U, H, B       vectors of `width` floats, signed and unsigned 32-bit, 16-bit and 8-bit integers
//   narrow16, narrow8   the low bits of each lane of a U
//   has_f16c            whether it has F from_f16(H) and H to_f16(F)
#pragma once

#include <cstring>

#include "kernels/variants.h"

namespace cofire {
namespace {

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline T load_any(const unsigned char* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(T));
  return value;
}

template <class V>
inline typename V::F splat(float value) {
  return typename V::F{} + value;
}

template <class V>
inline typename V::U splat_bits(uint32_t value) {
  return typename V::U{} + value;
}

// --- Elements that are accumulated in fp32: how a vector of them becomes floats, and the canonical floats become them.

template <class V>
struct F32 {
  using Raw = typename V::F;
  static constexpr size_t size = 4;
  static typename V::F decode(Raw raw) { return raw; }
  static Raw encode(typename V::F value) { return value; }
};

// Rounds with integers: VCVTNEPS2BF16 of AVX-512 takes denormals for zero, whatever MXCSR says, and so differs.
template <class V>
struct BF16 {
  using Raw = typename V::H;
  static constexpr size_t size = 2;
  static typename V::F decode(Raw raw) {
    return bits_as<typename V::F>(__builtin_convertvector(raw, typename V::U) << 16);
  }
  static Raw encode(typename V::F value) {
    const auto bits = bits_as<typename V::U>(value);
    return V::narrow16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

// A format of `M` bits of mantissa, `E` bits of exponent and a sign, denormals included. `top` is the magnitude that
// stands for everything beyond the largest number: infinity, or NaN in e4m3, which has no infinity.
template <class V, class Raw, unsigned E, unsigned M, uint32_t top, uint32_t quiet_nan>
struct Minifloat {
  using F = typename V::F;
  using U = typename V::U;
  static constexpr uint32_t bias = (1u << (E - 1)) - 1, sign = 1u << (E + M);
  static constexpr uint32_t rebias = (127 - bias) << 23;  // Between the exponents of the format and of fp32.
  static constexpr uint32_t smallest_normal = rebias + (1u << 23);

  static F decode(U raw) {
    const U magnitude = (raw & (sign - 1)) << (23 - M);
    // A denormal m * 2^(1 - bias - M) is read as (1 + m / 2^M) * 2^(1 - bias), less 2^(1 - bias): exact.
    const U denormal = bits_as<U>(bits_as<F>(magnitude + smallest_normal) - bits_as<F>(splat_bits<V>(smallest_normal)));
    U bits = magnitude < (1u << 23) ? denormal : magnitude + rebias;
    if constexpr (top == quiet_nan) {
      bits = magnitude == (top << (23 - M)) ? splat_bits<V>(0x7fc00000u) : bits;
    } else {
      // Infinity, and NaN with its mantissa.
      bits = magnitude >= (top << (23 - M)) ? magnitude | 0x7f800000u : bits;
    }
    return bits_as<F>(bits | ((raw & sign) << (31 - E - M)));
  }

  static U encode(F value) {
    const U bits = bits_as<U>(value);
    const U magnitude = bits & 0x7fffffffu;
    // Half of the last place less one, and one more if the last place is odd: to nearest, ties to even.
    const U normal = (magnitude + ((1u << (22 - M)) - 1) + ((magnitude >> (23 - M)) & 1u) - rebias) >> (23 - M);
    // Below the normal numbers all have one last place; adding a number with that last place rounds to it.
    constexpr uint32_t magic = rebias + ((24 - M) << 23);
    const U denormal = bits_as<U>(bits_as<F>(magnitude) + bits_as<F>(splat_bits<V>(magic))) - magic;
    U result = magnitude < smallest_normal ? denormal : normal;
    result = result > top ? splat_bits<V>(top) : result;
    if constexpr (top == quiet_nan) {
      return result | (result == top ? U{} : (bits >> (31 - E - M)) & sign);
    } else {
      result = magnitude > 0x7f800000u ? splat_bits<V>(quiet_nan) : result;
      return result | ((bits >> (31 - E - M)) & sign);
    }
  }
};

template <class V>
struct F16 {
  using Raw = typename V::H;
  using Slow = Minifloat<V, Raw, 5, 10, 0x7c00, 0x7e00>;
  static constexpr size_t size = 2;
  static typename V::F decode(Raw raw) {
    if constexpr (V::has_f16c) {
      return V::from_f16(raw);
    } else {
      return Slow::decode(__builtin_convertvector(raw, typename V::U));
    }
  }
  static Raw encode(typename V::F value) {
    if constexpr (V::has_f16c) {
      return V::to_f16(value);
    } else {
      return V::narrow16(Slow::encode(value));
    }
  }
};

template <class V>
struct E4M3 {
  using Raw = typename V::B;
  using Slow = Minifloat<V, Raw, 4, 3, 0x7f, 0x7f>;
  static constexpr size_t size = 1;
  static typename V::F decode(Raw raw) { return Slow::decode(__builtin_convertvector(raw, typename V::U)); }
  static Raw encode(typename V::F value) { return V::narrow8(Slow::encode(value)); }
};

// The canonical NaN is 0x7f, which PyTorch's cast writes; it is quiet, as 0x7e is.
template <class V>
struct E5M2 {
  using Raw = typename V::B;
  using Slow = Minifloat<V, Raw, 5, 2, 0x7c, 0x7f>;
  static constexpr size_t size = 1;
  static typename V::F decode(Raw raw) {
    if constexpr (V::has_f16c) {
      return V::from_f16(__builtin_convertvector(raw, typename V::H) << 8);  // The upper half of an fp16.
    } else {
      return Slow::decode(__builtin_convertvector(raw, typename V::U));
    }
  }
  static Raw encode(typename V::F value) { return V::narrow8(Slow::encode(value)); }
};

// --- Operations, over vectors of floats.

struct Sum {
  template <class F>
  static F apply(F a, F b) {
    return a + b;
  }
};

struct Product {
  template <class F>
  static F apply(F a, F b) {
    return a * b;
  }
};

// `a < b ? a : b` is b where the two compare equal or not at all. Both orders of arguments together tell the zeros apart
// (or, and: -0, +0) and keep a NaN of either, since or leaves a NaN's exponent full and its mantissa other than zero.
struct Min {
  template <class F>
  static F apply(F a, F b) {
    using S = decltype(a < b);
    return bits_as<F>(bits_as<S>(a < b ? a : b) | bits_as<S>(b < a ? b : a));
  }
};

struct Max {
  template <class F>
  static F apply(F a, F b) {
    using S = decltype(a < b);
    return bits_as<F>((bits_as<S>(a > b ? a : b) & bits_as<S>(b > a ? b : a)) | (a != a) | (b != b));
  }
};

// --- Loops.

template <class V>
struct Finish {
  bool divides;
  typename V::F divisor;

  explicit Finish(double by) : divides(by != 1.0), divisor(splat<V>(static_cast<float>(by))) {}

  typename V::F operator()(typename V::F acc) const {
    if (divides) acc = acc / divisor;
    return acc != acc ? bits_as<typename V::F>(splat_bits<V>(0x7fc00000u)) : acc;
  }
};

// `num_vectors` vectors at byte `at` of each source; `fixed` is the number of sources where the compiler should know it.
template <class V, class T, class O, size_t num_vectors, size_t fixed>
inline void reduce_block(const Task& task, const Finish<V>& finish, size_t at) {
  using Raw = typename T::Raw;
  const size_t num_sources = fixed ? fixed : task.num_sources;
  auto load = [&](size_t source, size_t vector) {
    const auto* from = static_cast<const unsigned char*>(task.sources[source]) + at;
    return T::decode(load_any<Raw>(from + vector * sizeof(Raw)));
  };
  typename V::F acc[num_vectors];
  for (size_t v = 0; v < num_vectors; ++v) acc[v] = load(0, v);
  for (size_t s = 1; s < num_sources; ++s) {
    for (size_t v = 0; v < num_vectors; ++v) acc[v] = O::template apply<typename V::F>(acc[v], load(s, v));
  }
  auto* to = static_cast<unsigned char*>(task.target) + at;
  for (size_t v = 0; v < num_vectors; ++v) {
    const Raw raw = T::encode(finish(acc[v]));
    __builtin_memcpy(to + v * sizeof(Raw), &raw, sizeof(Raw));
  }
}

template <class V, class T, class O, size_t fixed>
void reduce_floats_of(const Task& task) {
  using Raw = typename T::Raw;
  constexpr size_t unrolled = 4;
  const Finish<V> finish(task.divisor);
  const size_t size_bytes = task.count * T::size;
  size_t at = 0;
  for (; at + unrolled * sizeof(Raw) <= size_bytes; at += unrolled * sizeof(Raw)) {
    reduce_block<V, T, O, unrolled, fixed>(task, finish, at);
  }
  for (; at + sizeof(Raw) <= size_bytes; at += sizeof(Raw)) reduce_block<V, T, O, 1, fixed>(task, finish, at);
  if (at == size_bytes) return;
  // What is less than a vector goes through one, so that it is the same arithmetic and nothing outside is touched.
  typename V::F acc{};
  for (size_t s = 0; s < task.num_sources; ++s) {
    Raw raw{};
    memcpy(&raw, static_cast<const unsigned char*>(task.sources[s]) + at, size_bytes - at);
    const auto value = T::decode(raw);
    acc = s ? O::template apply<typename V::F>(acc, value) : value;
  }
  const Raw raw = T::encode(finish(acc));
  memcpy(static_cast<unsigned char*>(task.target) + at, &raw, size_bytes - at);
}

template <class V, class T, class O>
void reduce_floats(const Task& task) {
  // Two ranks in a node, or a node and its one child in the tree: common enough for loops of their own.
  if (task.num_sources == 2) return reduce_floats_of<V, T, O, 2>(task);
  reduce_floats_of<V, T, O, 0>(task);
}

template <class V, class T>
void reduce_by_op(const Task& task) {
  switch (task.op) {
    case Op::sum:
    case Op::average:
      return reduce_floats<V, T, Sum>(task);
    case Op::product:
      return reduce_floats<V, T, Product>(task);
    case Op::min:
      return reduce_floats<V, T, Min>(task);
    case Op::max:
      return reduce_floats<V, T, Max>(task);
    default:
      return;
  }
}

// --- fp64 and integers: plain loops over a block in the first-level cache, which the compiler makes vectors of.

struct Double {
  using Value = double;
  using Bits = uint64_t;
  template <class O>
  static double apply(double a, double b) {
    if constexpr (O::op == Op::sum) return a + b;
    if constexpr (O::op == Op::product) return a * b;
    // Bits as a signed number in the order of the values, -0 below +0.
    const int64_t x = ordered(a), y = ordered(b);
    const double chosen = (O::op == Op::min ? x < y : x > y) ? a : b;
    const double one_nan = b != b ? b : chosen;
    return a != a ? a : one_nan;
  }
  static double finish(double acc, double divisor) {
    acc = acc / divisor;
    return acc != acc ? bits_as<double>(uint64_t{0x7ff8000000000000}) : acc;
  }

 private:
  static int64_t ordered(double value) {
    const auto bits = bits_as<int64_t>(value);
    return bits ^ static_cast<int64_t>(static_cast<uint64_t>(bits >> 63) >> 1);
  }
};

template <class Signed, class Unsigned>
struct Integer {
  using Value = Signed;
  template <class O>
  static Signed apply(Signed a, Signed b) {
    // Unsigned arithmetic wraps around; signed overflow is undefined.
    const auto x = static_cast<Unsigned>(a), y = static_cast<Unsigned>(b);
    if constexpr (O::op == Op::sum) return static_cast<Signed>(x + y);
    if constexpr (O::op == Op::product) return static_cast<Signed>(x * y);
    if constexpr (O::op == Op::min) return a < b ? a : b;
    if constexpr (O::op == Op::max) return a > b ? a : b;
    if constexpr (O::op == Op::bit_and) return static_cast<Signed>(x & y);
    if constexpr (O::op == Op::bit_or) return static_cast<Signed>(x | y);
    return static_cast<Signed>(x ^ y);
  }
  static Signed finish(Signed acc, double divisor) {
    return static_cast<Signed>(static_cast<int64_t>(acc) / static_cast<int64_t>(divisor));
  }
};

template <Op which>
struct Plain {
  static constexpr Op op = which;
};

template <class T, class O>
void reduce_plain(const Task& task) {
  using Value = typename T::Value;
  constexpr size_t block = 512 / sizeof(Value);
  constexpr bool is_float = static_cast<Value>(0.5) != 0;
  for (size_t at = 0; at < task.count; at += block) {
    const size_t left = task.count - at, length = left < block ? left : block;
    Value acc[block] = {}, next[block] = {};
    memcpy(acc, static_cast<const unsigned char*>(task.sources[0]) + at * sizeof(Value), length * sizeof(Value));
    for (size_t s = 1; s < task.num_sources; ++s) {
      memcpy(next, static_cast<const unsigned char*>(task.sources[s]) + at * sizeof(Value), length * sizeof(Value));
      for (size_t i = 0; i < block; ++i) acc[i] = T::template apply<O>(acc[i], next[i]);
    }
    if (is_float || task.divisor != 1.0) {
      for (size_t i = 0; i < block; ++i) acc[i] = T::finish(acc[i], task.divisor);
    }
    memcpy(static_cast<unsigned char*>(task.target) + at * sizeof(Value), acc, length * sizeof(Value));
  }
}

template <class T>
void reduce_plain_by_op(const Task& task) {
  switch (task.op) {
    case Op::sum:
    case Op::average:
      return reduce_plain<T, Plain<Op::sum>>(task);
    case Op::product:
      return reduce_plain<T, Plain<Op::product>>(task);
    case Op::min:
      return reduce_plain<T, Plain<Op::min>>(task);
    case Op::max:
      return reduce_plain<T, Plain<Op::max>>(task);
    default:
      break;
  }
  if constexpr (static_cast<typename T::Value>(0.5) == 0) {
    if (task.op == Op::bit_and) return reduce_plain<T, Plain<Op::bit_and>>(task);
    if (task.op == Op::bit_or) return reduce_plain<T, Plain<Op::bit_or>>(task);
    if (task.op == Op::bit_xor) return reduce_plain<T, Plain<Op::bit_xor>>(task);
  }
}

template <class V>
void reduce_task(const Task& task) {
  switch (task.element) {
    case Element::f32:
      return reduce_by_op<V, F32<V>>(task);
    case Element::f64:
      return reduce_plain_by_op<Double>(task);
    case Element::f16:
      return reduce_by_op<V, F16<V>>(task);
    case Element::bf16:
      return reduce_by_op<V, BF16<V>>(task);
    case Element::e4m3:
      return reduce_by_op<V, E4M3<V>>(task);
    case Element::e5m2:
      return reduce_by_op<V, E5M2<V>>(task);
    case Element::i32:
      return reduce_plain_by_op<Integer<int32_t, uint32_t>>(task);
    case Element::i64:
      return reduce_plain_by_op<Integer<int64_t, uint64_t>>(task);
  }
}

}  // namespace
}  // namespace cofire
