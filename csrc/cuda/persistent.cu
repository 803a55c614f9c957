// Gramian, solver and combination in one launch (persistent.h): of one problem by all blocks or by a cluster of them, or of each sample by a block.
#define MMFAST_ISA cuda
#include "persistent.h"

#include <cooperative_groups.h>

#include <map>
#include <mutex>
#include <optional>

#include "launch.h"
#include "warp.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

struct Work {
  Dtype dtype;
  FewRows rows;
  Units units;              // of one problem
  int64_t samples;          // that are a problem each, or 0
  bool cluster;             // all blocks are one
  int64_t sample_bytes;     // of a row
  int64_t kept_steps;
  Steps<4, 64> chain;
  int n_steps, K, state_size;
  bool preserve_norm;
  double precision;
  double *info, *state;  // of each problem: weights [K] and Gramian [K, K], what the rules keep
  int64_t* rng;
  double* slots;  // in memory; those of a cluster are with its blocks
  void* out;
};

constexpr int kRowsDoubles = (sizeof(FewRows) + 15) / 16 * 2;

// Numbers of a block in shared memory beside its rows, seed and counter, and what it keeps: Gramian, weights, state, scratch of the solver, a multiple of 16 bytes.
MMFAST_HD inline int64_t solver_doubles(int K, int state_size) {
  return (K * K + K + state_size + scratch_doubles(K) + 1) / 2 * 2;
}
template <class T>
MMFAST_HD inline int64_t fixed_bytes(int K, int state_size) {
  return (kRowsDoubles + 2 + solver_doubles(K, state_size)) * 8 + tile_shared<T>() * static_cast<int64_t>(sizeof(Acc<T>));
}

// A block's shared memory: its rows, seed and counter, Gramian, weights, state and scratch of the solver, then what its type decides.
extern __shared__ double shared_memory[];
struct Memory {
  FewRows& rows;
  int64_t* rng;
  double *G, *w, *state, *scratch, *rest;
  __device__ explicit Memory(const Work& work)
      : rows(*reinterpret_cast<FewRows*>(shared_memory)), rng(reinterpret_cast<int64_t*>(shared_memory + kRowsDoubles)), G(shared_memory + kRowsDoubles + 2),
        w(G + work.K * work.K), state(w + work.K), scratch(state + work.state_size), rest(G + solver_doubles(work.K, work.state_size)) {}
  // Doubles from the solver's scratch to the end of where chains meet: free between the two.
  __device__ int stage_room(const Work& work) const {
    const int meeting = work.dtype == Dtype::f64 ? tile_shared<double>() : tile_shared<float>() / 2;
    return static_cast<int>(rest - scratch) + meeting;
  }
  template <class T>
  __device__ Acc<T>* meeting() const {
    return reinterpret_cast<Acc<T>*>(rest);
  }
  template <class T>
  __device__ Kept<T> kept(const Work& work) const {
    return {reinterpret_cast<T*>(meeting<T>() + tile_shared<T>()), work.kept_steps, rows.k};
  }
  // Behind all that is kept.
  template <class T>
  __device__ double* slots(const Work& work) const {
    return reinterpret_cast<double*>(kept<T>(work).at(work.kept_steps, 0, 0));
  }
};

// All blocks share one problem, or each has its own.
__device__ Share share_of(const Work& work) { return work.samples ? Share{0, 1} : Share{blockIdx.x, gridDim.x}; }
__device__ Slots slots_of(const Work& work) {
  if (!work.cluster) return {work.slots + (work.samples ? blockIdx.x * work.units.slots() * pair_count(work.rows.k) : 0), 0};
  double* at = nullptr;
  with_type(work.dtype, [&](auto zero) { at = Memory(work).slots<decltype(zero)>(work); });
  return {at, gridDim.x};
}

// The phases are functions of their own and the kernel is one: the assembler goes through all solvers once for every kernel that calls them.
// What they share is in shared memory, for a register that lives through a call is missing in it.
__device__ __noinline__ void begin_phase(const Work& work, int64_t problem) {
  const Memory memory(work);
  const int S = work.state_size, thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    memory.rows = work.rows;
    for (int i = 0; i < work.rows.k; ++i) memory.rows.at[i] = static_cast<const char*>(work.rows.at[i]) + problem * work.sample_bytes;
    if (work.rows.mask) memory.rows.mask += problem * work.rows.mask_stride;
    memory.rng[0] = work.rng ? work.rng[0] : 0, memory.rng[1] = work.rng ? work.rng[1] : 0;
  }
  for (int i = thread; i < S; i += kThreads) memory.state[i] = work.state[problem * S + i];
}

template <class T, int R>
__device__ __noinline__ void read_phase(const Work& work) {
  const Memory memory(work);
  const Kept<T> kept = memory.kept<T>(work);
  ask<T, R>(Block{}, memory.rows, work.units, share_of(work), kept);
  sum_kept<T, R>(Block{}, memory.rows, work.units, share_of(work), kept, memory.meeting<T>(), slots_of(work));
}

// Every block of one problem solves: the same numbers, and nobody has to wait for them; block 0 writes them.
__device__ __noinline__ void solve_phase(const Work& work, int64_t problem) {
  const Memory memory(work);
  const int K = work.K, S = work.state_size, thread = static_cast<int>(threadIdx.x);
  fold_few(Block{}, memory.rows, K, slots_of(work), work.units.slots(), memory.scratch, memory.stage_room(work), memory.G);
  __syncthreads();
  if (work.cluster) arrive_in_cluster();  // this block reads no other's slots any more: those may end
  if (thread < kTeamLanes) {
    const Chain chain{work.chain.steps, work.n_steps, work.chain.params, work.preserve_norm, work.precision};
    const Io io{memory.G, memory.rows.mask, S ? memory.state : nullptr, static_cast<uint64_t>(memory.rng[0]), static_cast<uint32_t>(memory.rng[1]),
                static_cast<uint32_t>(problem), memory.w};
    solve(Warp{}, chain, K, io, memory.scratch, reinterpret_cast<int*>(memory.scratch + solve_work_size(K)));
  }
  __syncthreads();
  if (!work.samples && blockIdx.x) return;
  double* info = work.info + problem * (K + K * K);
  for (int i = thread; i < K; i += kThreads) info[i] = memory.w[i];
  for (int i = thread; i < K * K; i += kThreads) info[K + i] = memory.G[i];
  for (int i = thread; i < S; i += kThreads) work.state[problem * S + i] = memory.state[i];
  if (thread == 0 && work.rng && !work.samples) work.rng[1] = memory.rng[1] + 1;
}

template <class T>
__device__ __noinline__ void write_phase(const Work& work, int64_t problem) {
  const Memory memory(work);
  static_assert(sizeof(Entering<T>) <= tile_shared<T>() * sizeof(Acc<T>), "nothing meets any more: the room is free");
  Entering<T>& entering = *reinterpret_cast<Entering<T>*>(memory.rest);
  combine_kept(Block{}, memory.rows, work.units, share_of(work), memory.kept<T>(work), memory.w, entering,
               static_cast<T*>(work.out) + problem * work.units.elements);
}

__global__ void __launch_bounds__(kThreads, kPersistentPerProcessor) persistent_kernel(const __grid_constant__ Work work) {
  for (int64_t problem = work.samples ? blockIdx.x : 0; problem < (work.samples ? work.samples : 1); problem += gridDim.x) {
    __syncthreads();  // nobody still reads what the problem before left
    begin_phase(work, problem);
    __syncthreads();
    with_type(work.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (work.rows.k <= 2) return read_phase<T, 2>(work);
      if (work.rows.k <= 4) return read_phase<T, 4>(work);
      if constexpr (sizeof(T) < 8) read_phase<T, 8>(work);
    });
    // state and counter were read before the barrier, and are written after it
    if (work.samples) __syncthreads();
    else if (work.cluster) arrive_in_cluster(), wait_for_cluster();
    else cooperative_groups::this_grid().sync();
    solve_phase(work, problem);
    with_type(work.dtype, [&](auto zero) { write_phase<decltype(zero)>(work, problem); });
  }
  if (work.cluster) wait_for_cluster();
}

// One launch of the kernel: of a cluster, of blocks that wait for each other, or of blocks each by itself.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  Launch(Path path, int64_t blocks, int64_t shared, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = path == Path::per_sample ? 0 : 1;
    if (path == Path::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;
};

// What a device has, and what the kernel may ask it for from now on; nothing where it did not answer.
std::optional<Limits> prepare(int device) {
  bool answered = true;
  auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return true;
    cudaGetLastError();  // asking is no error of the caller's
    return answered = false;
  };
  auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    return check(cudaDeviceGetAttribute(&value, what, device)) ? value : 0;
  };
  Limits limits{ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                ask(cudaDevAttrCooperativeLaunch) != 0, 0, false};
  auto may = [](cudaFuncAttribute what, int64_t value) { return cudaFuncSetAttribute(persistent_kernel, what, static_cast<int>(value)); };
  cudaFuncAttributes kernel{};
  if (!answered || !check(may(cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_block)) ||
      !check(may(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) || !check(cudaFuncGetAttributes(&kernel, persistent_kernel)))
    return std::nullopt;
  if (ask(cudaDevAttrComputeCapabilityMajor) < 9 || kernel.ptxVersion < 90) return limits;  // what was written for older GPUs knows neither
  int driver = 0;
  limits.overlap = check(cudaDriverGetVersion(&driver)) && driver >= 12030;  // that captures such launches
  if (!ask(cudaDevAttrClusterLaunch)) return limits;
  // more than eight blocks are not promised on every device, nor that some group of processors is large enough for so many
  int clusters = 0;
  const bool more = may(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  for (int64_t blocks = more ? 16 : 8; blocks && !limits.cluster; blocks /= 2) {
    const Launch launch(Path::cluster, blocks, limits.shared_block, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, persistent_kernel, &launch.config) == cudaSuccess && clusters) limits.cluster = blocks;
    else cudaGetLastError();
  }
  return limits;
}

// Whether those blocks that wait for each other all run at once.
bool fits(const Plan& plan, const Limits& limits) {
  if (plan.path != Path::persistent) return true;
  int fitting = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, persistent_kernel, kThreads, static_cast<size_t>(plan.shared)) != cudaSuccess) cudaGetLastError();
  return fitting * limits.processors >= plan.blocks;
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

Plan plan(const Grads& g, int state_size, const Limits& limits) {
  Plan found{};
  cuda::with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t fixed = cuda::fixed_bytes<T>(g.K <= kPersistentRows ? g.K : kPersistentRows, state_size);
    const bool one = g.per == Per::batch && g.mask_stride == 0 && g.K <= kPersistentRows;
    found = g.per == Per::sample && g.K <= kPersistentRows ? plan_samples(g.k, g.batch, g.inner, sizeof(T), fixed, limits)
                                                           : plan_resolve(g.k, g.batch * g.inner, sizeof(T), fixed, one, limits);
  });
  return found;
}

Limits limits(int device) {
  static std::mutex lock;
  static std::map<int, Limits> known;
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const std::optional<Limits> limits = cuda::prepare(device);
  return limits ? known[device] = *limits : Limits{};  // no path but that of two passes, until it answers
}

bool resolve_at_once(const Grads& g, const SolveArgs& args, int64_t* rng, const Plan& plan, const Limits& limits, double* slots, void* out, Stream stream) {
  cuda::Work work{};
  if (!work.chain.take(args) || !cuda::fits(plan, limits)) return false;
  work.rows = cuda::rows_of<kPersistentRows>(g);
  const bool samples = plan.path == Path::per_sample;
  work.units = cuda::whole_units(samples ? g.inner : g.batch * g.inner);
  work.samples = samples ? g.batch : 0;
  work.cluster = plan.path == Path::cluster;
  work.kept_steps = plan.kept_steps;
  work.n_steps = args.n_steps, work.K = args.K, work.state_size = static_cast<int>(args.state ? args.state_stride : 0);
  work.preserve_norm = args.preserve_norm, work.precision = args.precision;
  work.info = args.w, work.state = args.state, work.rng = rng, work.slots = slots;
  work.dtype = g.dtype, work.out = out;
  cuda::with_type(g.dtype, [&](auto zero) { work.sample_bytes = g.inner * static_cast<int64_t>(sizeof zero); });
  const cuda::Launch launch(plan.path, plan.blocks, plan.shared, cuda::raw(stream));
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, cuda::persistent_kernel, work);
  if (work.cluster && (error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidConfiguration)) {
    cudaGetLastError();  // there are fewer processors than when the device was asked, and nothing has run
    return false;
  }
  cuda::check_launch(samples ? "per_sample" : work.cluster ? "cluster" : "persistent");
  if (samples && rng) cuda::advance(rng, stream);
  return true;
}

}  // namespace gpu
}  // namespace mmfast
