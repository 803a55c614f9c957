// Launching: how a kernel starts and what is said where it does not, and arguments in the form that kernels take.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "gram.h"
#include "kernels.h"

namespace mmfast {
namespace MMFAST_ISA {

inline cudaStream_t cuda_stream(gpu::Stream stream) { return static_cast<cudaStream_t>(stream); }

// What any call answers once a kernel, whoever started it, has gone wrong while it ran.
inline bool is_of_a_running_kernel(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable: return true;
    default: return false;
  }
}

// Whether a launch asked for more than the device gives this process at the time (MPS, green contexts), whatever it said before. Nothing has run, and
// nobody hears of it.
inline bool was_refused(cudaError_t error) {
  const bool refused = error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidConfiguration ||
                       error == cudaErrorInvalidClusterSize || error == cudaErrorNotSupported;
  if (refused) cudaGetLastError();
  return refused;
}

// Throws where `error` is one. It is the launch's own answer: what the runtime remembers may be somebody else's.
inline void check_launch(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told now
  const char* waits = std::getenv("CUDA_LAUNCH_BLOCKING");
  const std::string name = kernel, reason = std::string(": ") + cudaGetErrorString(error);
  if (!is_of_a_running_kernel(error)) throw std::runtime_error("mmfast: the CUDA kernel " + name + " did not start" + reason);
  if (waits && std::strcmp(waits, "0") != 0) throw std::runtime_error("mmfast: the CUDA kernel " + name + " failed" + reason);
  throw std::runtime_error("mmfast: an earlier kernel, of mmfast or not, failed, and " + name + " did not start" + reason + "; CUDA_LAUNCH_BLOCKING=1 shows which");
}

// plain: after the kernel before it in the stream. dependent: while that one ends; the kernel must call grid_dependency_wait() before it reads what
// that one writes. cooperative: all blocks at once, so that they may wait for each other. cluster: all blocks are one cluster.
enum class LaunchMode { plain, dependent, cooperative, cluster };

inline LaunchMode dependent_if(bool overlap) { return overlap ? LaunchMode::dependent : LaunchMode::plain; }

// A launch, with `shared` bytes of dynamic shared memory to a block.
class Launch {
 public:
  Launch(LaunchMode mode, dim3 grid, int threads, gpu::Stream stream, int64_t shared = 0) : mode_(mode) {
    config_.gridDim = grid;
    config_.blockDim = dim3(static_cast<unsigned>(threads));
    config_.dynamicSmemBytes = static_cast<size_t>(shared);
    config_.stream = cuda_stream(stream);
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
  // Starts the kernel, whose name is for people, or throws. It need not overlap.
  template <class... Parameters, class... Arguments>
  void start(const char* name, void (*kernel)(Parameters...), Arguments&&... arguments) const {
    cudaError_t error = cudaLaunchKernelEx(&config_, kernel, arguments...);
    if (mode_ == LaunchMode::dependent && was_refused(error)) {
      cudaLaunchConfig_t plain = config_;
      plain.numAttrs = 0;
      error = cudaLaunchKernelEx(&plain, kernel, arguments...);
    }
    check_launch(error, name);
  }
  // The same, but false where it was refused.
  template <class... Parameters, class... Arguments>
  bool try_start(const char* name, void (*kernel)(Parameters...), Arguments&&... arguments) const {
    const cudaError_t error = cudaLaunchKernelEx(&config_, kernel, arguments...);
    if (was_refused(error)) return false;
    check_launch(error, name);
    return true;
  }
  // For the occupancy calculator.
  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  LaunchMode mode_;
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

// Blocks of a kernel that a processor of the current device runs at once; 0 where it does not say. Asked once, for every call of resolve wants to know.
template <class Kernel>
int blocks_per_processor(Kernel* kernel, int threads, int64_t shared) {
  static std::mutex lock;
  static std::map<std::tuple<int, Kernel*, int64_t>, int> known;
  int device = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return cudaGetLastError(), 0;
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto found = known.find({device, kernel, shared}); found != known.end()) return found->second;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)) != cudaSuccess) return cudaGetLastError(), 0;
  return known[{device, kernel, shared}] = blocks;
}

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
inline void advance(int64_t* rng, gpu::Stream stream) { Launch(LaunchMode::plain, dim3(1), 1, stream).start("advance", advance_kernel, rng); }

// Blocks of a grid-stride loop over n items: enough to fill any GPU several times.
inline unsigned blocks_for(int64_t n) {
  constexpr int64_t kMaxBlocks = 8192;
  return static_cast<unsigned>(n < 1 ? 1 : n < kMaxBlocks ? n : kMaxBlocks);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
