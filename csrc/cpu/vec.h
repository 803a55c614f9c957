// Vectors of one instruction set. A "step" is 64 bytes of accumulator: 16 float or 8 double lanes, whatever the register width;
// narrower registers take a step in several parts. Every lane does the same operations everywhere, so all sets give equal bits.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../numbers.h"

namespace mmfast {
namespace MMFAST_ISA {

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
  static MMFAST_INLINE void store(Half* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
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
  static MMFAST_INLINE void store(Half* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
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

// Every other processor, in registers of 16 bytes as the compiler spells them: NEON on ARM, where a fused multiply-add is one instruction; correct but
// slow on x86 without AVX2, where it is a function.
template <class T>
struct VecPortable {
  using Acc = T;
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int width = static_cast<int>(16 / sizeof(T)), parts = 4;
  template <class F>
  static MMFAST_INLINE Reg make(F f) {
    Reg r;
    for (int i = 0; i < width; ++i) r[i] = f(i);
    return r;
  }
  static MMFAST_INLINE Reg zero() { return Reg{}; }
  static MMFAST_INLINE Reg set(T x) { return x - Reg{}; }
  static MMFAST_INLINE Reg load(const T* p) {
    Reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static MMFAST_INLINE void store(T* p, Reg r) { std::memcpy(p, &r, sizeof r); }
  static MMFAST_INLINE void stream(T* p, Reg r) { store(p, r); }
  static MMFAST_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return make([&](int i) { return std::fma(a[i], b[i], c[i]); });
  }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static MMFAST_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static MMFAST_INLINE Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static MMFAST_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static MMFAST_INLINE Reg load(const Bfloat* p) {
    return make([&](int i) { return load_acc(p + i); });
  }
#if defined(__aarch64__)  // the compiler would convert float16 one by one
  static MMFAST_INLINE Reg load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static MMFAST_INLINE void store(Half* p, Reg r) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(r))); }
#else
  static MMFAST_INLINE Reg load(const Half* p) {
    return make([&](int i) { return load_acc(p + i); });
  }
  static MMFAST_INLINE void store(Half* p, Reg r) {
    for (int i = 0; i < width; ++i) store_acc(p + i, r[i]);
  }
#endif
};
using VecF = VecPortable<float>;
using VecD = VecPortable<double>;

#endif

// The lanes of a step added in a tree: i and i + L/2, then i and i + L/4, ...
template <class A>
MMFAST_INLINE double reduce_lanes(const A* lanes) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
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
  constexpr int L = kLanes<A>;
  A t[L];
  std::memcpy(t, lanes, sizeof(t));
  for (int stride = L / 2; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) t[i] += t[i + stride];
  return t[0];
#endif
}

// What elements of a type are computed in.
template <class T>
using Vec = std::conditional_t<std::is_same_v<T, double>, VecD, VecF>;

// n elements as accumulators.
template <class T>
inline void load_row(const T* row, int64_t n, Acc<T>* out) {
  using V = Vec<T>;
  int64_t t = 0;
  for (; t + V::width <= n; t += V::width) V::store(out + t, V::load(row + t));
  for (; t < n; ++t) out[t] = load_acc(row + t);
}

// n sums rounded to elements.
template <class T>
inline void store_row(const Acc<T>* sums, int64_t n, T* out) {
  using V = Vec<T>;
  int64_t t = 0;
  if constexpr (!std::is_same_v<T, Bfloat>)  // whose rounding the compiler turns into vectors
    for (; t + V::width <= n; t += V::width) V::store(out + t, V::load(sums + t));
  for (; t < n; ++t) store_acc(out + t, sums[t]);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
