// What PTX computes and C++ has no operator for: the PTX ISA's rules for NaN, overflow, counts beyond the width.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, x);
}

template <class T>
constexpr uint32_t kBits = sizeof(T) * 8;
template <class T>
constexpr bool kIsFloat = std::is_floating_point_v<T>;

inline float from_f16(uint16_t x) { return static_cast<float>(bits<_Float16>(x)); }
inline uint16_t to_f16(float x) { return bits<uint16_t>(static_cast<_Float16>(x)); }
inline float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
inline uint16_t to_bf16(float x) {  // to the nearest, to even between two
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// NaN is 0 in narrow integers and the smallest number of 64 bits; what is too large is the largest.
template <class T, class F>
inline T to_integer(F x) {
  using Limits = std::numeric_limits<T>;
  if (x != x) return sizeof(T) == 8 ? static_cast<T>(uint64_t{1} << 63) : 0;
  const F end = std::ldexp(F(1), Limits::digits);
  return x >= end ? Limits::max() : x <= (Limits::is_signed ? -end : F(0)) ? Limits::min() : static_cast<T>(x);
}

// Integers are not divided by zero on the processor of the host, which would stop.
template <class T>
inline T quotient(T a, T b) {
  if constexpr (kIsFloat<T>) return a / b;
  else return b == 0 ? static_cast<T>(-1) : std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a / b;
}
template <class T>
inline T remainder_of(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == static_cast<T>(-1) ? 0 : a % b;
}

// Of a number and NaN the number; -0 is below +0.
template <class T>
inline T minimum(T a, T b) {
  if constexpr (kIsFloat<T>) return a == 0 && b == 0 ? (std::signbit(a) ? a : b) : std::fmin(a, b);
  else return a < b ? a : b;
}
template <class T>
inline T maximum(T a, T b) {
  if constexpr (kIsFloat<T>) return a == 0 && b == 0 ? (std::signbit(a) ? b : a) : std::fmax(a, b);
  else return a > b ? a : b;
}
template <class T>
inline T absolute(T x) {
  if constexpr (kIsFloat<T>) return std::fabs(x);
  else return x < 0 ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(x)) : x;
}

template <class T>
inline T shift_left(T x, uint32_t n) {
  return n >= kBits<T> ? 0 : static_cast<T>(static_cast<std::make_unsigned_t<T>>(x) << n);
}
template <class T>
inline T shift_right(T x, uint32_t n) {
  return static_cast<T>(n >= kBits<T> ? (x < 0 ? -1 : 0) : x >> n);
}
template <class T>
inline T low_bits(uint32_t n) {
  return n >= kBits<T> ? static_cast<T>(-1) : static_cast<T>((T{1} << n) - 1);
}
template <class T>
inline T insert_bits(T x, T into, uint32_t at, uint32_t count) {
  at &= 255, count &= 255;
  if (at >= kBits<T>) return into;
  const T mask = low_bits<T>(count);
  return (into & ~(mask << at)) | ((x & mask) << at);
}
template <class T>
inline T extract_bits(T x, uint32_t at, uint32_t count) {
  using U = std::make_unsigned_t<T>;
  at &= 255, count &= 255;
  const U found = shift_right(static_cast<U>(x), at) & low_bits<U>(count);
  const uint32_t sign = at + count - 1 < kBits<T> ? at + count - 1 : kBits<T> - 1;
  const bool negative = std::is_signed_v<T> && count && (shift_right(static_cast<U>(x), sign) & 1);
  return static_cast<T>(negative ? found | ~low_bits<U>(count) : found);
}
template <class T>
inline uint32_t leading_zeros(T x) {
  return x ? static_cast<uint32_t>(__builtin_clzll(x)) - (64 - kBits<T>) : kBits<T>;
}
template <class T>
inline T high_product(T a, T b) {
  using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                  std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> kBits<T>);
}

template <bool clamp>
inline uint32_t funnel_shift_left(uint32_t low, uint32_t high, uint32_t n) {
  n = clamp ? (n < 32 ? n : 32) : n & 31;
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << n) >> 32);
}
template <bool clamp>
inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t n) {
  n = clamp ? (n < 32 ? n : 32) : n & 31;
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> n);
}
// Byte i of the result is byte number `selector` of b : a, or its sign.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i) & 15, byte = static_cast<uint8_t>(both >> (8 * (selector & 7)));
    found |= (selector & 8 ? (byte & 0x80 ? 255u : 0u) : byte) << (8 * i);
  }
  return found;
}

// rcp.approx.ftz.f64 keeps the upper 32 bits.
inline double rough_reciprocal(double x) { return bits<double>(bits<uint64_t>(1 / x) & 0xffffffff00000000ull); }
inline float rough_reciprocal(float x) { return 1 / x; }
