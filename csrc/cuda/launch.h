// Launching: types by name, and a check after every launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gram.h"
#include "kernels.h"

namespace mmfast {
namespace MMFAST_ISA {

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("mmfast: the CUDA kernel ") + kernel + " did not start: " + cudaGetErrorString(error));
}

template <class F>
MMFAST_HD inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f16: return f(Half{});
    case Dtype::bf16: return f(Bfloat{});
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
  }
}

inline cudaStream_t raw(gpu::Stream stream) { return static_cast<cudaStream_t>(stream); }

inline Rows rows_of(const Grads& g) {
  Rows rows{};
  for (int i = 0; i < g.k; ++i) rows.at[i] = g.rows[i], rows.places[i] = static_cast<int16_t>(g.places[i]);
  rows.k = g.k;
  rows.mask = g.mask;
  rows.mask_stride = g.mask_stride;
  return rows;
}

static __global__ void advance_kernel(int64_t* rng) { ++rng[1]; }

// Moves a random stream on by one call.
inline void advance(int64_t* rng, gpu::Stream stream) {
  advance_kernel<<<1, 1, 0, raw(stream)>>>(rng);
  check_launch("advance");
}

// Blocks of a grid-stride loop over n items: enough to fill any GPU several times.
inline unsigned blocks_for(int64_t n) {
  constexpr int64_t kMost = 8192;
  return static_cast<unsigned>(n < 1 ? 1 : n < kMost ? n : kMost);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
