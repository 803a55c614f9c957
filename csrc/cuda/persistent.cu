// Gramian, solver and combination of one problem in a cooperative launch (persistent.h).
#define MMFAST_ISA cuda
#include "persistent.h"

#include <cooperative_groups.h>

#include "../solvers/solve.h"
#include "launch.h"
#include "warp.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kFewSteps = 4, kFewParams = 64;  // of a chain that travels with the kernel's arguments

struct Work {
  Dtype dtype;
  FewRows rows;
  Units units;
  int64_t kept_steps;
  int64_t steps[2 * kFewSteps];
  double params[kFewParams];
  int n_steps, K, state_size;
  bool preserve_norm, skip;
  double precision;
  double *info, *state;  // weights [K], Gramian [K, K]; both are written by block 0
  int64_t* rng;
  double* slots;
  void* out;
};

// Numbers of a block in shared memory beside what it keeps: Gramian, weights, state, scratch of the solver, a multiple of 16 bytes.
MMFAST_HD inline int64_t solver_doubles(int K, int state_size) {
  return (K * K + K + state_size + solve_work_size(K) + (solve_iwork_size(K) + 1) / 2 + 1) / 2 * 2;
}
template <class T>
MMFAST_HD inline int64_t fixed_bytes(int K, int state_size) {
  return solver_doubles(K, state_size) * 8 + tile_shared<T>() * static_cast<int64_t>(sizeof(Acc<T>));
}

// A block's shared memory: Gramian, weights, state and scratch of the solver, then what its type decides.
struct Memory {
  double *G, *w, *state, *scratch, *rest;
  __device__ Memory(const Work& work, double* at)
      : G(at), w(G + work.K * work.K), state(w + work.K), scratch(state + work.state_size), rest(at + solver_doubles(work.K, work.state_size)) {}
  template <class T>
  __device__ Acc<T>* meeting() const {
    return reinterpret_cast<Acc<T>*>(rest);
  }
  template <class T>
  __device__ Kept<T> kept(const Work& work) const {
    return {reinterpret_cast<T*>(meeting<T>() + tile_shared<T>()), work.kept_steps, work.rows.k};
  }
};

// The phases are functions of their own and the kernel is one: the assembler goes through all solvers once for every kernel that calls them.
template <class T, int R>
__device__ __noinline__ void read_phase(const Work& work, const Memory& memory, const Share& share) {
  const Kept<T> kept = memory.kept<T>(work);
  ask(Block{}, work.rows, work.units, share, kept);
  sum_kept<T, R>(Block{}, work.rows, work.units, share, kept, memory.meeting<T>(), work.slots);
}

template <class T>
__device__ __noinline__ void write_phase(const Work& work, const Memory& memory, const Share& share) {
  static_assert(sizeof(Entering<T>) <= tile_shared<T>() * sizeof(Acc<T>), "nothing meets any more: the room is free");
  Entering<T>& entering = *reinterpret_cast<Entering<T>*>(memory.rest);
  combine_kept(Block{}, work.rows, work.units, share, memory.kept<T>(work), memory.w, work.skip, entering, static_cast<T*>(work.out));
}

__global__ void __launch_bounds__(kThreads, kPersistentPerProcessor) persistent_kernel(const __grid_constant__ Work work) {
  extern __shared__ double shared[];
  const Memory memory(work, shared);
  const int K = work.K, S = work.state_size, thread = static_cast<int>(threadIdx.x);
  const Share share{blockIdx.x, gridDim.x};

  // before the barrier, for block 0 writes them after it
  for (int i = thread; i < S; i += kThreads) memory.state[i] = work.state[i];
  const int64_t seed = work.rng ? work.rng[0] : 0, counter = work.rng ? work.rng[1] : 0;
  with_type(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (work.rows.k <= 2) return read_phase<T, 2>(work, memory, share);
    if (work.rows.k <= 4) return read_phase<T, 4>(work, memory, share);
    if constexpr (sizeof(T) < 8) read_phase<T, 8>(work, memory, share);
  });
  cooperative_groups::this_grid().sync();
  fold_few(Block{}, work.rows, K, work.slots, work.units.slots(), memory.G);
  __syncthreads();
  if (thread < kTeamLanes) {  // every block solves: the same numbers, and nobody has to wait for them
    const Chain chain{work.steps, work.n_steps, work.params, work.preserve_norm, work.precision};
    const Io io{memory.G, work.rows.mask, S ? memory.state : nullptr, static_cast<uint64_t>(seed), static_cast<uint32_t>(counter), 0, memory.w};
    solve(Warp{}, chain, K, io, memory.scratch, reinterpret_cast<int*>(memory.scratch + solve_work_size(K)));
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int i = thread; i < K; i += kThreads) work.info[i] = memory.w[i];
    for (int i = thread; i < K * K; i += kThreads) work.info[K + i] = memory.G[i];
    for (int i = thread; i < S; i += kThreads) work.state[i] = memory.state[i];
    if (thread == 0 && work.rng) work.rng[1] = counter + 1;
  }
  with_type(work.dtype, [&](auto zero) { write_phase<decltype(zero)>(work, memory, share); });
}

Limits limits_of(int device) {
  auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, what, device) == cudaSuccess ? value : 0;
  };
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          ask(cudaDevAttrCooperativeLaunch) != 0};
}

bool fits(const Plan& plan, const Limits& limits) {
  int fitting = 0;
  const int shared = static_cast<int>(plan.shared);
  const bool known = cudaFuncSetAttribute(persistent_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess &&
                     cudaFuncSetAttribute(persistent_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
                     cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, persistent_kernel, kThreads, shared) == cudaSuccess;
  if (!known) cudaGetLastError();  // asking is no error of the caller's
  return known && fitting * limits.processors >= plan.blocks;
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

Plan plan(const Grads& g, int state_size, const Limits& limits) {
  Plan found{};
  cuda::with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool one = g.per == Per::batch && g.mask_stride == 0 && g.K <= kPersistentRows;
    found = plan_resolve(g.k, g.batch * g.inner, sizeof(T), cuda::fixed_bytes<T>(g.K, state_size), one, limits);
  });
  return found;
}

Limits limits(int device) { return cuda::limits_of(device); }

bool resolve_at_once(const Grads& g, const SolveArgs& args, int64_t* rng, bool skip, const Plan& plan, const Limits& limits, double* slots, void* out, Stream stream) {
  int64_t n_params = 0;
  for (int s = 0; s < args.n_steps; ++s) n_params += args.steps[2 * s + 1];
  if (args.n_steps > cuda::kFewSteps || n_params > cuda::kFewParams || !cuda::fits(plan, limits)) return false;
  cuda::Work work{};
  for (int i = 0; i < g.k; ++i) work.rows.at[i] = g.rows[i], work.rows.places[i] = static_cast<int16_t>(g.places[i]);
  work.rows.k = g.k;
  work.rows.mask = g.mask;
  work.units = cuda::whole_units(g.batch * g.inner);
  work.kept_steps = plan.kept_steps;
  for (int s = 0; s < 2 * args.n_steps; ++s) work.steps[s] = args.steps[s];
  for (int64_t p = 0; p < n_params; ++p) work.params[p] = args.params[p];
  work.n_steps = args.n_steps, work.K = args.K, work.state_size = static_cast<int>(args.state ? args.state_stride : 0);
  work.preserve_norm = args.preserve_norm, work.skip = skip, work.precision = args.precision;
  work.info = args.w, work.state = args.state, work.rng = rng, work.slots = slots;
  work.dtype = g.dtype, work.out = out;
  void* arguments[] = {&work};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(cuda::persistent_kernel), dim3(static_cast<unsigned>(plan.blocks)), dim3(cuda::kThreads), arguments,
                              static_cast<size_t>(plan.shared), cuda::raw(stream));
  cuda::check_launch("persistent");
  return true;
}

}  // namespace gpu
}  // namespace mmfast
