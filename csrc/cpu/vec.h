// Vectors of one instruction set. A "step" is 64 bytes of accumulator: 16 float or 8 double lanes, whatever the register width;
// narrower registers take a step in several parts. Every lane does the same operations everywhere, so all sets give equal bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#ifndef MMFAST_ISA
#define MMFAST_ISA portable
#endif

#define MMFAST_INLINE inline __attribute__((always_inline))

namespace mmfast {
namespace MMFAST_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct VecF {
  using Acc = float;
  using Reg = __m512;
  static constexpr int width = 16, parts = 1;
  static MMFAST_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static MMFAST_INLINE Reg set(float x) { return _mm512_set1_ps(x); }
  static MMFAST_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static MMFAST_INLINE void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static MMFAST_INLINE void stream(float* p, Reg v) { _mm512_stream_ps(p, v); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static MMFAST_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static MMFAST_INLINE Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static MMFAST_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static MMFAST_INLINE Reg load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static MMFAST_INLINE Reg load(const Bfloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
};

struct VecD {
  using Acc = double;
  using Reg = __m512d;
  static constexpr int width = 8, parts = 1;
  static MMFAST_INLINE Reg zero() { return _mm512_setzero_pd(); }
  static MMFAST_INLINE Reg set(double x) { return _mm512_set1_pd(x); }
  static MMFAST_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static MMFAST_INLINE void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  static MMFAST_INLINE void stream(double* p, Reg v) { _mm512_stream_pd(p, v); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static MMFAST_INLINE Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static MMFAST_INLINE Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static MMFAST_INLINE Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
};

#elif defined(__AVX2__)

struct VecF {
  using Acc = float;
  using Reg = __m256;
  static constexpr int width = 8, parts = 2;
  static MMFAST_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static MMFAST_INLINE Reg set(float x) { return _mm256_set1_ps(x); }
  static MMFAST_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static MMFAST_INLINE void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static MMFAST_INLINE void stream(float* p, Reg v) { _mm256_stream_ps(p, v); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static MMFAST_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static MMFAST_INLINE Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static MMFAST_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static MMFAST_INLINE Reg load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static MMFAST_INLINE Reg load(const Bfloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
};

struct VecD {
  using Acc = double;
  using Reg = __m256d;
  static constexpr int width = 4, parts = 2;
  static MMFAST_INLINE Reg zero() { return _mm256_setzero_pd(); }
  static MMFAST_INLINE Reg set(double x) { return _mm256_set1_pd(x); }
  static MMFAST_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static MMFAST_INLINE void store(double* p, Reg v) { _mm256_storeu_pd(p, v); }
  static MMFAST_INLINE void stream(double* p, Reg v) { _mm256_stream_pd(p, v); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static MMFAST_INLINE Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static MMFAST_INLINE Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static MMFAST_INLINE Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
};

#else

// For processors without AVX2: correct everywhere, fast only where the compiler knows a fused multiply-add.
template <class T, int W>
struct VecPortable {
  using Acc = T;
  struct Reg {
    T v[W];
  };
  static constexpr int width = W, parts = static_cast<int>(64 / sizeof(T)) / W;
  template <class F>
  static MMFAST_INLINE Reg make(F f) {
    Reg r;
    for (int i = 0; i < W; ++i) r.v[i] = f(i);
    return r;
  }
  static MMFAST_INLINE Reg zero() {
    return make([](int) { return T(0); });
  }
  static MMFAST_INLINE Reg set(T x) {
    return make([&](int) { return x; });
  }
  static MMFAST_INLINE Reg load(const T* p) {
    return make([&](int i) { return p[i]; });
  }
  static MMFAST_INLINE void store(T* p, Reg r) {
    for (int i = 0; i < W; ++i) p[i] = r.v[i];
  }
  static MMFAST_INLINE void stream(T* p, Reg r) { store(p, r); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return make([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
  }
  static MMFAST_INLINE Reg add(Reg a, Reg b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
  }
  static MMFAST_INLINE Reg min(Reg a, Reg b) {
    return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static MMFAST_INLINE Reg max(Reg a, Reg b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static MMFAST_INLINE Reg load(const Half* p) {
    return make([&](int i) { return half_to_float(p[i].bits); });
  }
  static MMFAST_INLINE Reg load(const Bfloat* p) {
    return make([&](int i) {
      const uint32_t bits = static_cast<uint32_t>(p[i].bits) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    });
  }
  static MMFAST_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) {  // zero and subnormal
      const float x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
      return sign ? -x : x;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};
using VecF = VecPortable<float, 4>;
using VecD = VecPortable<double, 4>;

#endif

// The lanes of a step added in a tree: i and i + L/2, then i and i + L/4, ...
template <class Acc>
MMFAST_INLINE double fold(const Acc* lanes) {
#if defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) {
    const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  } else {
    const __m256d four = _mm256_add_pd(_mm256_loadu_pd(lanes), _mm256_loadu_pd(lanes + 4));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
#else
  constexpr int L = 64 / sizeof(Acc);
  Acc t[L];
  std::memcpy(t, lanes, sizeof(t));
  for (int stride = L / 2; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) t[i] += t[i + stride];
  return t[0];
#endif
}

// What a stored type is computed in, and how one number is written back (round to nearest even).
template <class T>
struct Stored {
  using Vec = VecF;
};
template <>
struct Stored<double> {
  using Vec = VecD;
};

template <class T>
constexpr int kStep = static_cast<int>(64 / sizeof(typename Stored<T>::Vec::Acc));  // elements of one step

MMFAST_INLINE void write(float* p, float x) { *p = x; }
MMFAST_INLINE void write(double* p, double x) { *p = x; }
MMFAST_INLINE void write(Bfloat* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}
MMFAST_INLINE void write(Half* p, float x) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float a = std::fabs(x);
  if (x != x) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (a >= 65520.0f) {
    p->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (a < 6.103515625e-5f) {  // subnormal: a multiple of 2^-24, rounded by the addition of 2^23 ulps
    p->bits = static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(a * 16777216.0f)));
  } else {
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
    p->bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
#endif
}

MMFAST_INLINE void read(const float* p, float* x) { *x = *p; }
MMFAST_INLINE void read(const double* p, double* x) { *x = *p; }
MMFAST_INLINE void read(const Bfloat* p, float* x) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  std::memcpy(x, &bits, 4);
}
MMFAST_INLINE void read(const Half* p, float* x) {
#if defined(__F16C__)
  *x = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p->bits)));
#else
  *x = VecF::half_to_float(p->bits);
#endif
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
