// Functions of a vector of doubles: each lane as every other instruction set computes it, within two units of the last place where it is not said otherwise.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

using Doubles = VecD::Reg;
typedef int64_t Longs __attribute__((vector_size(sizeof(Doubles))));
typedef uint64_t Unsigned __attribute__((vector_size(sizeof(Doubles))));

MMFAST_INLINE Doubles all(double x) { return VecD::set(x); }
// Comparisons are all bits or none; select gives a where all are set, b where none is.
#if defined(__SSE2__) && !defined(__AVX2__)  // gcc 12 does not compile its own words for them without an instruction that compares integers of 64 bits
MMFAST_INLINE Longs less(Doubles a, Doubles b) { return (Longs)_mm_cmplt_pd(a, b); }
MMFAST_INLINE Longs no_more(Doubles a, Doubles b) { return (Longs)_mm_cmple_pd(a, b); }
MMFAST_INLINE Doubles select(Longs where, Doubles a, Doubles b) { return (Doubles)((where & (Longs)a) | (~where & (Longs)b)); }
#else
MMFAST_INLINE Longs less(Doubles a, Doubles b) { return a < b; }
MMFAST_INLINE Longs no_more(Doubles a, Doubles b) { return a <= b; }
MMFAST_INLINE Doubles select(Longs where, Doubles a, Doubles b) { return where ? a : b; }
#endif
MMFAST_INLINE bool all_bits(Longs where) {
  int64_t both = -1;
  for (int l = 0; l < VecD::width; ++l) both &= where[l];
  return both == -1;
}
MMFAST_INLINE Doubles at_least(Doubles x, double low) { return select(less(x, all(low)), all(low), x); }  // what is not a number stays so
MMFAST_INLINE Doubles at_most(Doubles x, double high) { return select(less(all(high), x), all(high), x); }

// c[0] + c[1] x + ... + c[n - 1] x^(n - 1), pairs first (Estrin): so that few steps wait for another.
template <int n>
MMFAST_INLINE Doubles in_pairs(Doubles x, const Doubles (&c)[n]) {
  if constexpr (n == 1) {
    return c[0];
  } else {
    Doubles pairs[(n + 1) / 2];
    for (int i = 0; i < n / 2; ++i) pairs[i] = VecD::fma(c[2 * i + 1], x, c[2 * i]);
    if constexpr (n % 2) pairs[n / 2] = c[n - 1];
    return in_pairs(x * x, pairs);
  }
}
template <int n>
MMFAST_INLINE Doubles polynomial(Doubles x, const double (&coefficients)[n]) {
  Doubles c[n];
  for (int i = 0; i < n; ++i) c[i] = all(coefficients[i]);
  return in_pairs(x, c);
}

constexpr double kRound = 0x1.8p52;  // added, it rounds to an integer, which the lowest bits then hold
constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;  // the first times an exponent is exact

// 2^n and e^r - 1 with x = n log 2 + r; x from -708 to 709
struct Power {
  Doubles scale, rest;
};
MMFAST_INLINE Power power(Doubles x) {
  x = at_most(at_least(x, -708.0), 709.0);
  const Doubles t = VecD::fma(x, all(1.4426950408889634), all(kRound)), n = t - all(kRound);
  const Doubles r = VecD::fma(n, all(-kLn2Low), VecD::fma(n, all(-kLn2High), x));
  static constexpr double kInverseFactorials[] = {1.0 / 2,         1.0 / 6,           1.0 / 24,           1.0 / 120,         1.0 / 720,         1.0 / 5040,
                                                  1.0 / 40320,     1.0 / 362880,      1.0 / 3628800,      1.0 / 39916800,    1.0 / 479001600.0, 1.0 / 6227020800.0};
  const Unsigned bits = ((Unsigned)t << 52) + (Unsigned)all(1.0);  // unsigned: what is not a number may wrap around
  return {(Doubles)bits, VecD::fma(r * r, polynomial(r, kInverseFactorials), r)};
}
MMFAST_INLINE Doubles exp(Doubles x) {
  const Power p = power(x);
  return VecD::fma(p.scale, p.rest, p.scale);
}
MMFAST_INLINE Doubles expm1(Doubles x) {
  const Power p = power(x);
  return VecD::fma(p.scale, p.rest, p.scale - all(1.0));
}

// Of a normal number above zero; infinity and what is not a number stay.
MMFAST_INLINE Doubles log(Doubles x) {
  constexpr uint64_t kBias = uint64_t{1023} << 52;
  const Unsigned shifted = (Unsigned)x - (Unsigned)all(0.70710678118654752) + kBias;
  const Longs n = (Longs)(shifted >> 52) - 1023;  // x = m 2^n, m from sqrt(1/2) to sqrt(2)
  const Doubles m = (Doubles)((Unsigned)x - ((Unsigned)n << 52)), e = (Doubles)(n + (Longs)all(kRound)) - all(kRound);
  const Doubles f = m - all(1.0), s = f / (f + all(2.0)), z = s * s, half = all(0.5) * f * f;
  static constexpr double kOdd[] = {2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  const Doubles series = z * polynomial(z, kOdd);  // log(1 + f) = f - half + s (half + series)
  const Doubles y = VecD::fma(e, all(kLn2High), f - (half - VecD::fma(s, half + series, e * all(kLn2Low))));
  return select(less(x, all(HUGE_VAL)), y, x);
}

// log(1 + e^x) and its derivative
struct Softplus {
  Doubles value, slope;
};
MMFAST_INLINE Softplus softplus(Doubles x) {
  const Longs positive = less(all(0.0), x);
  const Doubles e = exp(select(positive, -x, x)), w = all(1.0) + e, inverse = all(1.0) / w;
  const Doubles rest = (e - (w - all(1.0))) * inverse;  // of log(1 + e), what w has lost of it
  return {log(w) + rest + at_least(x, 0.0), select(positive, inverse, e * inverse)};
}

// log Gamma(x) and its derivative for x > 0: of x + 10 by Stirling's series, and back; to 1e-14 of the largest summand.
MMFAST_INLINE Doubles product_of_ten(Doubles x, Doubles& reciprocals) {
  Doubles p = x, slope = all(1.0);
  for (int i = 1; i < 10; ++i) {
    const Doubles next = x + all(i);
    slope = VecD::fma(slope, next, p);
    p = p * next;
  }
  reciprocals = slope / p;
  return p;
}
MMFAST_INLINE Doubles lgamma(Doubles x) {
  const Longs small = less(x, all(10.0));
  Doubles unused;
  const Doubles p = product_of_ten(select(small, x, all(1.0)), unused), z = select(small, x + all(10.0), x), r = all(1.0) / z;
  static constexpr double kStirling[] = {1.0 / 12, -1.0 / 360, 1.0 / 1260, -1.0 / 1680, 1.0 / 1188, -691.0 / 360360, 1.0 / 156, -3617.0 / 122400};
  const Doubles y = VecD::fma(z - all(0.5), log(z), all(0.91893853320467274178) - z) + r * polynomial(r * r, kStirling);
  return y - select(small, log(p), all(0.0));
}
MMFAST_INLINE Doubles digamma(Doubles x) {
  const Longs small = less(x, all(10.0));
  Doubles reciprocals;
  product_of_ten(select(small, x, all(1.0)), reciprocals);
  const Doubles z = select(small, x + all(10.0), x), r = all(1.0) / z;
  static constexpr double kSeries[] = {1.0 / 12, -1.0 / 120, 1.0 / 252, -1.0 / 240, 1.0 / 132, -691.0 / 32760, 1.0 / 12, -3617.0 / 8160};
  const Doubles y = log(z) - all(0.5) * r - r * r * polynomial(r * r, kSeries);
  return y - select(small, reciprocals, all(0.0));
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
