// The four types of gradients: how one is read into the precision it is summed in, and rounded back.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../solvers/team.h"

namespace mmfast {
namespace MMFAST_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class T>
struct Sum {
  using Type = float;
};
template <>
struct Sum<double> {
  using Type = double;
};
template <class T>
using Acc = typename Sum<T>::Type;

MMFAST_HD inline float number(const float* p) { return *p; }
MMFAST_HD inline double number(const double* p) { return *p; }
MMFAST_HD inline float number(const Bfloat* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

MMFAST_HD inline void put(float* p, float x) { *p = x; }
MMFAST_HD inline void put(double* p, double x) { *p = x; }

#ifdef __CUDACC__
__device__ inline float number(const Half* p) { return __half2float(__ushort_as_half(p->bits)); }
__device__ inline void put(Half* p, float x) { p->bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void put(Bfloat* p, float x) { p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#endif

}  // namespace MMFAST_ISA
}  // namespace mmfast
