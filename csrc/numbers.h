// The four types of gradients, on the CPU and on the GPU: what each is summed in, how one element is loaded and stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "args.h"
#include "isa.h"

namespace mmfast {
namespace MMFAST_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// f(tag), a value of the type.
template <class F>
MMFAST_HD inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f16: return f(Half{});
    case Dtype::bf16: return f(Bfloat{});
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
  }
}

// What elements are multiplied and added in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of one step: 64 bytes of accumulators.
template <class T>
constexpr int kLanes = static_cast<int>(64 / sizeof(Acc<T>));

// What a factor of a matrix product is stored in: float16 is widened, for scaled rows could leave its range though their sum does not.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, Half>, float, T>;

MMFAST_HD MMFAST_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
MMFAST_HD MMFAST_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// float16 where neither the GPU nor F16C nor ARM converts it: what they give, bit for bit, but for the payload of a NaN.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {  // zero and subnormal
    const float x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  return from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13));
}
inline uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float a = std::fabs(x);
  if (x != x) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // subnormal: a multiple of 2^-24, rounded by the addition of 2^23 ulps
  if (a < 6.103515625e-5f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(a * 16777216.0f)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// One element in the type that it is summed in.
MMFAST_HD MMFAST_INLINE float load_acc(const float* p) { return *p; }
MMFAST_HD MMFAST_INLINE double load_acc(const double* p) { return *p; }
MMFAST_HD MMFAST_INLINE float load_acc(const Bfloat* p) { return from_bits(static_cast<uint32_t>(p->bits) << 16); }
MMFAST_HD MMFAST_INLINE float load_acc(const Half* p) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(p->bits));
#elif defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(p->bits)));
#elif defined(__aarch64__) && !defined(__CUDACC__)
  __fp16 half;
  memcpy(&half, p, sizeof half);
  return half;
#else
  return half_to_float(p->bits);
#endif
}

// A sum rounded to the nearest element, ties to even.
MMFAST_HD MMFAST_INLINE void store_acc(float* p, float x) { *p = x; }
MMFAST_HD MMFAST_INLINE void store_acc(double* p, double x) { *p = x; }
MMFAST_HD MMFAST_INLINE void store_acc(Bfloat* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
#endif
}
MMFAST_HD MMFAST_INLINE void store_acc(Half* p, float x) {
#if defined(__CUDA_ARCH__)
  p->bits = __half_as_ushort(__float2half_rn(x));
#elif defined(__F16C__)
  p->bits = static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 0));
#elif defined(__aarch64__) && !defined(__CUDACC__)
  const __fp16 half = static_cast<__fp16>(x);
  memcpy(p, &half, sizeof half);
#else
  p->bits = float_to_half(x);
#endif
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
