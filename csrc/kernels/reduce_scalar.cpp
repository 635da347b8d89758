#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/variants.h"

namespace cofire {
namespace {

template <class T>
T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <class T>
void write(char* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

// Rounds a float's magnitude to a format of fewer bits, to nearest even.
//
// `shift` mantissa bits go; exponents are biased by `bias`. What is below the least normal number is added to a number
// whose last place is the format's least one, so that the processor rounds it.
uint32_t narrow(uint32_t magnitude, int shift, int bias, uint32_t denormal_exponent) {
  const uint32_t least_normal = static_cast<uint32_t>(128 - bias) << 23;
  if (magnitude < least_normal) {
    const uint32_t offset = denormal_exponent << 23;
    return std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(offset)) - offset;
  }
  const uint32_t odd = (magnitude >> shift) & 1;
  return (magnitude - (static_cast<uint32_t>(127 - bias) << 23) + (1u << (shift - 1)) - 1 + odd) >> shift;
}

uint32_t magnitude_of(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffff; }
uint32_t sign_of(float value, int bits) { return (std::bit_cast<uint32_t>(value) >> 31) << (bits - 1); }

uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_f16(float value) {
  if (std::isnan(value)) return 0x7e00;
  const uint32_t magnitude = magnitude_of(value);
  const uint32_t result = magnitude >= 0x47800000 ? 0x7c00 : narrow(magnitude, 13, 15, 126);
  return static_cast<uint16_t>(result | sign_of(value, 16));
}

uint8_t to_e4m3(float value) {
  const uint32_t magnitude = magnitude_of(value);
  const uint32_t result = magnitude >= 0x43f00000 ? 0x7f : narrow(magnitude, 20, 7, 141);
  return static_cast<uint8_t>(result >= 0x7f ? 0x7f : result | sign_of(value, 8));
}

uint8_t to_e5m2(float value) {
  if (std::isnan(value)) return 0x7f;
  const uint32_t magnitude = magnitude_of(value);
  const uint32_t result = magnitude >= 0x47800000 ? 0x7c : narrow(magnitude, 21, 15, 134);
  return static_cast<uint8_t>(result | sign_of(value, 8));
}

float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | (mantissa << 13));
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float from_e4m3(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24, rest = bits & 0x7f;
  if (rest == 0x7f) return std::bit_cast<float>(0x7fc00000);
  if (rest < 8) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(rest) * 0x1p-9f));
  return std::bit_cast<float>(sign | ((rest << 20) + (120u << 23)));
}

template <class T>
T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
  else return a + b;
}

template <class T>
T multiply(T a, T b) {
  if constexpr (std::is_integral_v<T>) return static_cast<T>(std::make_unsigned_t<T>(a) * std::make_unsigned_t<T>(b));
  else return a * b;
}

template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? a : b;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}

template <class T>
T greatest(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? a : b;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

template <class T>
T bit_and(T a, T b) { return a & b; }
template <class T>
T bit_or(T a, T b) { return a | b; }
template <class T>
T bit_xor(T a, T b) { return a ^ b; }

template <class T>
T divide(T a, double divisor) {
  if constexpr (std::is_floating_point_v<T>) {
    return a / static_cast<T>(divisor);
  } else {
    return static_cast<T>(a / static_cast<T>(divisor));  // a number of ranks: 1 or more
  }
}

template <Element element, class T, class S>
struct Plain {
  using Vector = T;
  static constexpr size_t kSize = sizeof(S), kWidth = 1;
};

template <Element element>
struct Codec;

template <>
struct Codec<Element::f32> : Plain<Element::f32, float, float> {
  static float load(const char* at) { return read<float>(at); }
  static void store(char* at, float v) { write(at, std::isnan(v) ? std::bit_cast<float>(0x7fc00000) : v); }
};
template <>
struct Codec<Element::f64> : Plain<Element::f64, double, double> {
  static double load(const char* at) { return read<double>(at); }
  static void store(char* at, double v) { write(at, std::isnan(v) ? std::bit_cast<double>(0x7ff8000000000000) : v); }
};
template <>
struct Codec<Element::f16> : Plain<Element::f16, float, uint16_t> {
  static float load(const char* at) { return from_f16(read<uint16_t>(at)); }
  static void store(char* at, float v) { write(at, to_f16(v)); }
};
template <>
struct Codec<Element::bf16> : Plain<Element::bf16, float, uint16_t> {
  static float load(const char* at) { return std::bit_cast<float>(static_cast<uint32_t>(read<uint16_t>(at)) << 16); }
  static void store(char* at, float v) { write(at, to_bf16(v)); }
};
template <>
struct Codec<Element::e4m3> : Plain<Element::e4m3, float, uint8_t> {
  static float load(const char* at) { return from_e4m3(read<uint8_t>(at)); }
  static void store(char* at, float v) { write(at, to_e4m3(v)); }
};
template <>
struct Codec<Element::e5m2> : Plain<Element::e5m2, float, uint8_t> {
  // The upper half of an fp16 number.
  static float load(const char* at) { return from_f16(static_cast<uint16_t>(read<uint8_t>(at) << 8)); }
  static void store(char* at, float v) { write(at, to_e5m2(v)); }
};
template <>
struct Codec<Element::i32> : Plain<Element::i32, int32_t, int32_t> {
  static int32_t load(const char* at) { return read<int32_t>(at); }
  static void store(char* at, int32_t v) { write(at, v); }
};
template <>
struct Codec<Element::i64> : Plain<Element::i64, int64_t, int64_t> {
  static int64_t load(const char* at) { return read<int64_t>(at); }
  static void store(char* at, int64_t v) { write(at, v); }
};

#include "kernels/loop.inc"

}  // namespace

size_t reduce_scalar(Element element, Op op, char* target, const char* const* sources, size_t num_sources, size_t count,
                     double divisor) {
  return reduce_any(element, op, target, sources, num_sources, count, divisor);
}

}  // namespace cofire
