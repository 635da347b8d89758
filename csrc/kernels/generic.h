// The kernel, once for all instruction sets: a template over vector types of the compiler's vector extension.
//
// Each translation unit that includes this is compiled for another instruction set, so everything here has internal
// linkage (the unnamed namespace) and calls nothing from the standard library that the linker might share between them.
//
// A variant V says how long vectors are and may have faster ways than the integer routines below:
//   F, S, U, H    vectors of floats, signed and unsigned 32-bit and unsigned 16-bit integers, all of one length
//   D, L, M       vectors of doubles, signed and unsigned 64-bit integers, of that length too
//   has_f16c      whether it has what follows, which keeps the order of the elements
//   Short         half an H
//   from_f16      an F of a Short;  to_f16, the reverse
//   halves        two Short of an H
//   sign_extend   two H of a vector of bytes, held as U
//   join_bytes    a vector of bytes, held as U, of the low bytes of four U
//
// One vector of memory holds 1, 2 or 4 elements per float and so becomes as many vectors of floats. Which element lands
// in which does not matter, as long as it comes back to its place: without F16C, and for bf16, the elements of a 32-bit
// lane stay in that lane, so that nothing has to cross it.
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

template <class Vector, class Value>
inline Vector splat(Value value) {
  return Vector{} + value;
}

template <class Vector, int count>
struct Parts {
  using Part = Vector;
  static constexpr int size = count;
  Vector part[count];
};

// --- Elements that are accumulated in fp32. `decode` makes floats of a vector of memory, `encode` the reverse.

// What is common to them: the sum divided in fp32, and a NaN made the canonical one.
template <class V, class Memory, int count>
struct InFloat {
  using F = typename V::F;
  using U = typename V::U;
  using Raw = Memory;
  using Acc = Parts<F, count>;
  static constexpr bool is_integer = false;

  static F finish(F acc, double divisor) {
    if (divisor != 1.0) acc = acc / splat<F>(static_cast<float>(divisor));
    return acc != acc ? bits_as<F>(splat<U>(0x7fc00000u)) : acc;
  }
};

template <class V>
struct F32 : InFloat<V, typename V::F, 1> {
  using F = typename V::F;
  static Parts<F, 1> decode(F raw) { return {{raw}}; }
  static F encode(const Parts<F, 1>& value) { return value.part[0]; }
};

// Rounds with integers: VCVTNEPS2BF16 of AVX-512 takes denormals for zero, whatever MXCSR says, and so differs.
template <class V>
struct BF16 : InFloat<V, typename V::U, 2> {
  using F = typename V::F;
  using U = typename V::U;
  static Parts<F, 2> decode(U raw) { return {{bits_as<F>(raw << 16), bits_as<F>(raw & 0xffff0000u)}}; }
  static U encode(const Parts<F, 2>& value) {
    return (rounded(bits_as<U>(value.part[0])) >> 16) | (rounded(bits_as<U>(value.part[1])) & 0xffff0000u);
  }
  static U rounded(U bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }
};

// A format of `M` bits of mantissa, `E` bits of exponent and a sign, denormals included. `top` is the magnitude that
// stands for everything beyond the largest number: infinity, or NaN in e4m3, which has no infinity.
template <class V, int E, int M, int32_t top, int32_t quiet_nan>
struct Minifloat {
  using F = typename V::F;
  using S = typename V::S;
  using U = typename V::U;
  static constexpr int32_t bias = (1 << (E - 1)) - 1;
  static constexpr uint32_t sign = 1u << (E + M);
  static constexpr uint32_t rebias = uint32_t{127 - bias} << 23;  // Between the exponents of the format and of fp32.
  static constexpr uint32_t smallest_normal = rebias + (1u << 23);

  // Numbers without a sign are compared as signed ones: SSE and AVX2 have no other comparison.
  static F decode(U raw) {
    const U magnitude = (raw & (sign - 1)) << (23 - M);
    const S ordered = bits_as<S>(magnitude);
    // A denormal m * 2^(1 - bias - M) is read as (1 + m / 2^M) * 2^(1 - bias), less 2^(1 - bias): exact.
    const U denormal = bits_as<U>(bits_as<F>(magnitude + smallest_normal) - bits_as<F>(splat<U>(smallest_normal)));
    U bits = ordered < (1 << 23) ? denormal : magnitude + rebias;
    if constexpr (top == quiet_nan) {
      bits = ordered == (top << (23 - M)) ? splat<U>(0x7fc00000u) : bits;
    } else {
      // Infinity, and NaN with its mantissa.
      bits = ordered >= (top << (23 - M)) ? magnitude | 0x7f800000u : bits;
    }
    return bits_as<F>(bits | ((raw & sign) << (31 - E - M)));
  }

  static U encode(F value) {
    const U bits = bits_as<U>(value);
    const U magnitude = bits & 0x7fffffffu;
    const S ordered = bits_as<S>(magnitude);
    // Half of the last place less one, and one more if the last place is odd: to nearest, ties to even.
    const U normal = (magnitude + ((1u << (22 - M)) - 1 - rebias) + ((magnitude >> (23 - M)) & 1u)) >> (23 - M);
    // Below the normal numbers all have one last place; adding a number with that last place rounds to it.
    constexpr uint32_t magic = rebias + ((24u - M) << 23);
    const U denormal = bits_as<U>(bits_as<F>(magnitude) + bits_as<F>(splat<U>(magic))) - magic;
    S result = bits_as<S>(ordered < static_cast<int32_t>(smallest_normal) ? denormal : normal);
    result = result < top ? result : splat<S>(top);
    U signs = (bits >> (31 - E - M)) & sign;
    if constexpr (top == quiet_nan) {
      signs &= ~bits_as<U>(result == top);
    } else {
      const S nan = ordered > 0x7f800000;
      result = (result & ~nan) | (nan & quiet_nan);
      signs &= ~bits_as<U>(nan);
    }
    return bits_as<U>(result) | signs;
  }
};

// The elements of each 32-bit lane, one after the other, through integer routines.
template <class V, class Format, int count>
struct InLanes {
  using F = typename V::F;
  using U = typename V::U;
  static Parts<F, count> decode(U raw) {
    Parts<F, count> value;
    for (int p = 0; p < count; ++p) value.part[p] = Format::decode(raw >> (p * 32 / count));
    return value;
  }
  static U encode(const Parts<F, count>& value) {
    U raw{};
    for (int p = 0; p < count; ++p) raw |= Format::encode(value.part[p]) << (p * 32 / count);
    return raw;
  }
};

template <class V, bool has_f16c>
struct Half;

// F16C converts while it loads and stores, so that half a vector is best.
template <class V>
struct Half<V, true> : InFloat<V, typename V::Short, 1> {
  using Acc = Parts<typename V::F, 1>;
  static Acc decode(typename V::Short raw) { return {{V::from_f16(raw)}}; }
  static typename V::Short encode(const Acc& value) { return V::to_f16(value.part[0]); }
};

template <class V>
struct Half<V, false> : InFloat<V, typename V::U, 2> {
  using Lanes = InLanes<V, Minifloat<V, 5, 10, 0x7c00, 0x7e00>, 2>;
  using Acc = Parts<typename V::F, 2>;
  static Acc decode(typename V::U raw) { return Lanes::decode(raw); }
  static typename V::U encode(const Acc& value) { return Lanes::encode(value); }
};

template <class V>
using F16 = Half<V, V::has_f16c>;

// Types of one byte: to fp32 by way of fp16, of which e5m2 is the upper half; back with integers, as rounding twice is
// wrong.
template <class V, class Format, class ToHalf>
struct OneByte : InFloat<V, typename V::U, 4> {
  using F = typename V::F;
  using U = typename V::U;
  // `encode` makes NaN canonical by itself.
  static F finish(F acc, double divisor) { return divisor == 1.0 ? acc : acc / splat<F>(static_cast<float>(divisor)); }
  static Parts<F, 4> decode(U raw) {
    if constexpr (V::has_f16c) {
      const auto wide = V::sign_extend(raw);
      const auto low = V::halves(ToHalf::half(wide.part[0])), high = V::halves(ToHalf::half(wide.part[1]));
      return {{V::from_f16(low.part[0]) * ToHalf::scale, V::from_f16(low.part[1]) * ToHalf::scale,
               V::from_f16(high.part[0]) * ToHalf::scale, V::from_f16(high.part[1]) * ToHalf::scale}};
    } else {
      return InLanes<V, Format, 4>::decode(raw);
    }
  }
  static U encode(const Parts<F, 4>& value) {
    if constexpr (V::has_f16c) {
      Parts<U, 4> bytes;
      for (int p = 0; p < 4; ++p) bytes.part[p] = Format::encode(value.part[p]);
      return V::join_bytes(bytes);
    } else {
      return InLanes<V, Format, 4>::encode(value);
    }
  }
};

// An fp16 whose exponent is less by eight. What would be 480 is NaN.
template <class H>
struct HalfOfE4M3 {
  static constexpr float scale = 256.0f;
  static H half(H byte) {
    const H half = (byte << 7) & 0xbf80;
    return half | bits_as<H>((half & 0x7fff) == 0x3f80);
  }
};

template <class H>
struct HalfOfE5M2 {
  static constexpr float scale = 1.0f;
  static H half(H byte) { return byte << 8; }
};

template <class V>
using E4M3 = OneByte<V, Minifloat<V, 4, 3, 0x7f, 0x7f>, HalfOfE4M3<typename V::H>>;

// The canonical NaN is 0x7f, which PyTorch's cast writes; it is quiet, as 0x7e is.
template <class V>
using E5M2 = OneByte<V, Minifloat<V, 5, 2, 0x7c, 0x7f>, HalfOfE5M2<typename V::H>>;

// --- Elements that are accumulated in their own type.

template <class V>
struct F64 {
  using Raw = typename V::D;
  using Acc = Parts<Raw, 1>;
  static constexpr bool is_integer = false;
  static Acc decode(Raw raw) { return {{raw}}; }
  static Raw encode(const Acc& value) { return value.part[0]; }
  static Raw finish(Raw acc, double divisor) {
    if (divisor != 1.0) acc = acc / splat<Raw>(divisor);
    return acc != acc ? bits_as<Raw>(splat<typename V::M>(uint64_t{0x7ff8000000000000})) : acc;
  }
};

// `Signed` for the order, `Unsigned` for arithmetic that wraps around.
template <class Signed, class Unsigned, class Value>
struct Integer {
  using Raw = Unsigned;
  using Acc = Parts<Unsigned, 1>;
  using Ordered = Signed;
  static constexpr bool is_integer = true;
  static Acc decode(Raw raw) { return {{raw}}; }
  static Raw encode(const Acc& value) { return value.part[0]; }
  static Raw finish(Raw acc, double divisor) {
    if (divisor == 1.0) return acc;
    Value lanes[sizeof(Raw) / sizeof(Value)];
    __builtin_memcpy(lanes, &acc, sizeof(Raw));
    for (Value& lane : lanes) lane = static_cast<Value>(lane / static_cast<int64_t>(divisor));
    __builtin_memcpy(&acc, lanes, sizeof(Raw));
    return acc;
  }
};

// --- Operations, over vectors of the elements T.

struct Sum {
  template <class T, class A>
  static A apply(A a, A b) {
    return a + b;
  }
};

struct Product {
  template <class T, class A>
  static A apply(A a, A b) {
    return a * b;
  }
};

// `a < b ? a : b` is b where the two compare equal or not at all. Both orders of arguments together tell the zeros
// apart (or, and: -0, +0) and keep a NaN of either, since or leaves a NaN's exponent full and its mantissa not zero.
struct Min {
  template <class T, class A>
  static A apply(A a, A b) {
    if constexpr (T::is_integer) {
      return bits_as<typename T::Ordered>(a) < bits_as<typename T::Ordered>(b) ? a : b;
    } else {
      using S = decltype(a < b);
      return bits_as<A>(bits_as<S>(a < b ? a : b) | bits_as<S>(b < a ? b : a));
    }
  }
};

struct Max {
  template <class T, class A>
  static A apply(A a, A b) {
    if constexpr (T::is_integer) {
      return bits_as<typename T::Ordered>(a) > bits_as<typename T::Ordered>(b) ? a : b;
    } else {
      using S = decltype(a < b);
      return bits_as<A>((bits_as<S>(a > b ? a : b) & bits_as<S>(b > a ? b : a)) | (a != a) | (b != b));
    }
  }
};

struct BitAnd {
  template <class T, class A>
  static A apply(A a, A b) {
    return a & b;
  }
};

struct BitOr {
  template <class T, class A>
  static A apply(A a, A b) {
    return a | b;
  }
};

struct BitXor {
  template <class T, class A>
  static A apply(A a, A b) {
    return a ^ b;
  }
};

// --- Loops.

template <class T, class O>
inline void accumulate(typename T::Acc& acc, const typename T::Acc& next) {
  for (int p = 0; p < T::Acc::size; ++p) acc.part[p] = O::template apply<T>(acc.part[p], next.part[p]);
}

template <class T>
inline typename T::Raw round(typename T::Acc& acc, double divisor) {
  for (auto& part : acc.part) part = T::finish(part, divisor);
  return T::encode(acc);
}

// `num_vectors` vectors at byte `at` of each source; `fixed` is the number of sources where the compiler is to know it.
template <class T, class O, int num_vectors, size_t fixed>
inline void reduce_block(const Task& task, size_t at) {
  using Raw = typename T::Raw;
  const size_t num_sources = fixed ? fixed : task.num_sources;
  auto load = [&](size_t source, int vector) {
    const auto* from = static_cast<const unsigned char*>(task.sources[source]) + at;
    return T::decode(load_any<Raw>(from + vector * sizeof(Raw)));
  };
  typename T::Acc acc[num_vectors];
  for (int v = 0; v < num_vectors; ++v) acc[v] = load(0, v);
  for (size_t s = 1; s < num_sources; ++s) {
    for (int v = 0; v < num_vectors; ++v) accumulate<T, O>(acc[v], load(s, v));
  }
  auto* to = static_cast<unsigned char*>(task.target) + at;
  for (int v = 0; v < num_vectors; ++v) {
    const Raw raw = round<T>(acc[v], task.divisor);
    __builtin_memcpy(to + v * sizeof(Raw), &raw, sizeof(Raw));
  }
}

// What is less than a vector goes through one, so that it is the same arithmetic and nothing outside is touched.
template <class T, class O>
inline void reduce_rest(const Task& task, size_t at, size_t length) {
  using Raw = typename T::Raw;
  typename T::Acc acc{};
  for (size_t s = 0; s < task.num_sources; ++s) {
    Raw raw{};
    memcpy(&raw, static_cast<const unsigned char*>(task.sources[s]) + at, length);
    const auto next = T::decode(raw);
    if (s == 0) acc = next;
    if (s != 0) accumulate<T, O>(acc, next);
  }
  const Raw raw = round<T>(acc, task.divisor);
  memcpy(static_cast<unsigned char*>(task.target) + at, &raw, length);
}

template <class T, class O, size_t fixed>
void reduce_range(const Task& given) {
  const Task task = given;  // A copy that no store to the target can change, so that it stays in registers.
  constexpr size_t vector = sizeof(typename T::Raw);
  constexpr int unrolled = 4 / T::Acc::size;  // Four accumulators hide the latency of an addition.
  size_t at = 0;
  for (; task.size_bytes - at >= unrolled * vector; at += unrolled * vector) {
    reduce_block<T, O, unrolled, fixed>(task, at);
  }
  for (; task.size_bytes - at >= vector; at += vector) reduce_block<T, O, 1, fixed>(task, at);
  if (at < task.size_bytes) reduce_rest<T, O>(task, at, task.size_bytes - at);
}

template <class T, class O>
void reduce_as(const Task& task) {
  // Two ranks in a node, or a node and its one child in the tree: common enough for a loop of their own.
  if (task.num_sources == 2) return reduce_range<T, O, 2>(task);
  reduce_range<T, O, 0>(task);
}

template <class T>
void reduce_elements(const Task& task) {
  switch (task.op) {
    case Op::sum:
    case Op::average:
      return reduce_as<T, Sum>(task);
    case Op::product:
      return reduce_as<T, Product>(task);
    case Op::min:
      return reduce_as<T, Min>(task);
    case Op::max:
      return reduce_as<T, Max>(task);
    default:
      break;
  }
  if constexpr (T::is_integer) {
    if (task.op == Op::bit_and) return reduce_as<T, BitAnd>(task);
    if (task.op == Op::bit_or) return reduce_as<T, BitOr>(task);
    reduce_as<T, BitXor>(task);
  }
}

template <class V>
void reduce_task(const Task& task) {
  switch (task.element) {
    case Element::f32:
      return reduce_elements<F32<V>>(task);
    case Element::f64:
      return reduce_elements<F64<V>>(task);
    case Element::f16:
      return reduce_elements<F16<V>>(task);
    case Element::bf16:
      return reduce_elements<BF16<V>>(task);
    case Element::e4m3:
      return reduce_elements<E4M3<V>>(task);
    case Element::e5m2:
      return reduce_elements<E5M2<V>>(task);
    case Element::i32:
      return reduce_elements<Integer<typename V::S, typename V::U, int32_t>>(task);
    case Element::i64:
      return reduce_elements<Integer<typename V::L, typename V::M, int64_t>>(task);
  }
}

}  // namespace
}  // namespace cofire
