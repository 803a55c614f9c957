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

enum class Begin { after, overlapping, together };

// Starts a kernel: after the one before it, while that one ends (it must call wait_for_previous() first), or with all of its blocks at once.
template <class... Wanted, class... Given>
cudaError_t start(Begin begin, dim3 grid, int threads, cudaStream_t stream, void (*kernel)(Wanted...), Given&&... given) {
  cudaLaunchAttribute attribute{};
  if (begin == Begin::overlapping) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else if (begin == Begin::together) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = begin == Begin::after ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

inline Begin soon(bool overlap) { return overlap ? Begin::overlapping : Begin::after; }

inline cudaStream_t raw(gpu::Stream stream) { return static_cast<cudaStream_t>(stream); }

template <int most = kMaxRows>
inline RowsUpTo<most> rows_of(const Grads& g) {
  RowsUpTo<most> rows{};
  for (int i = 0; i < g.k; ++i) rows.at[i] = g.rows[i], rows.places[i] = static_cast<int16_t>(g.row_index[i]);
  rows.k = g.k;
  rows.mask = g.mask;
  rows.mask_stride = g.mask_stride;
  return rows;
}

// A chain of rules as an argument of a kernel: the arrays that Chain points to.
template <int most_steps, int most_params>
struct Steps {
  int64_t steps[2 * most_steps];
  double params[most_params];
  // False where they have no room.
  bool take(const SolveArgs& args) {
    int64_t n_params = 0;
    for (int s = 0; s < args.n_steps; ++s) n_params += args.steps[2 * s + 1];
    if (args.n_steps > most_steps || n_params > most_params) return false;
    for (int s = 0; s < 2 * args.n_steps; ++s) steps[s] = args.steps[s];
    for (int64_t p = 0; p < n_params; ++p) params[p] = args.params[p];
    return true;
  }
};

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
