// Launching: how a kernel starts, a check after every launch, and arguments in the form that kernels take.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gram.h"
#include "kernels.h"

namespace mmfast {
namespace MMFAST_ISA {

inline cudaStream_t cuda_stream(gpu::Stream stream) { return static_cast<cudaStream_t>(stream); }

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("mmfast: the CUDA kernel ") + kernel + " did not start: " + cudaGetErrorString(error));
}

// plain: after the kernel before it in the stream. dependent: while that one ends; the kernel must call grid_dependency_wait() before it reads what
// that one writes. cooperative: all blocks at once, so that they may wait for each other. cluster: all blocks are one cluster.
enum class LaunchMode { plain, dependent, cooperative, cluster };

inline LaunchMode dependent_if(bool overlap) { return overlap ? LaunchMode::dependent : LaunchMode::plain; }

// One launch, with `shared` bytes of dynamic shared memory to a block.
class Launch {
 public:
  Launch(LaunchMode mode, dim3 grid, int threads, cudaStream_t stream, int64_t shared = 0) {
    config_.gridDim = grid;
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shared);
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = mode == LaunchMode::plain ? 0 : 1;
    if (mode == LaunchMode::dependent) {
      attribute_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute_.val.programmaticStreamSerializationAllowed = 1;
    } else if (mode == LaunchMode::cooperative) {
      attribute_.id = cudaLaunchAttributeCooperative;
      attribute_.val.cooperative = 1;
    } else if (mode == LaunchMode::cluster) {
      attribute_.id = cudaLaunchAttributeClusterDimension;
      attribute_.val.clusterDim = {grid.x, grid.y, grid.z};
    }
  }
  Launch(const Launch&) = delete;
  template <class... Parameters, class... Arguments>
  cudaError_t operator()(void (*kernel)(Parameters...), Arguments&&... arguments) const {
    return cudaLaunchKernelEx(&config_, kernel, arguments...);
  }
  // For the occupancy calculator.
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

template <int max_rows = kMaxRows>
inline RowsUpTo<max_rows> rows_of(const Grads& g) {
  RowsUpTo<max_rows> rows{};
  for (int i = 0; i < g.k; ++i) rows.ptr[i] = g.rows[i], rows.row_index[i] = static_cast<int16_t>(g.row_index[i]);
  rows.k = g.k;
  rows.mask = g.mask;
  rows.mask_stride = g.mask_stride;
  return rows;
}

// A chain of rules as an argument of a kernel: the arrays that Chain points to.
template <int max_steps, int max_params>
struct ChainArrays {
  int64_t steps[2 * max_steps];
  double params[max_params];
  // False where they have no room.
  bool copy(const SolveArgs& args) {
    int64_t n_params = 0;
    for (int s = 0; s < args.n_steps; ++s) n_params += args.steps[2 * s + 1];
    if (args.n_steps > max_steps || n_params > max_params) return false;
    for (int s = 0; s < 2 * args.n_steps; ++s) steps[s] = args.steps[s];
    for (int64_t p = 0; p < n_params; ++p) params[p] = args.params[p];
    return true;
  }
};

static __global__ void advance_kernel(int64_t* rng) { ++rng[1]; }

// Moves a random stream on by one call.
inline void advance(int64_t* rng, gpu::Stream stream) {
  advance_kernel<<<1, 1, 0, cuda_stream(stream)>>>(rng);
  check_launch("advance");
}

// Blocks of a grid-stride loop over n items: enough to fill any GPU several times.
inline unsigned blocks_for(int64_t n) {
  constexpr int64_t kMaxBlocks = 8192;
  return static_cast<unsigned>(n < 1 ? 1 : n < kMaxBlocks ? n : kMaxBlocks);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
