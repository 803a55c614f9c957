// Gramian, solver and combination in one launch (persistent.h): of one problem by all blocks or by a cluster of them, or of each sample by a block.
#define MMFAST_ISA cuda
#include "persistent.h"

#include <cooperative_groups.h>

#include "launch.h"
#include "norm.h"
#include "warp.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

struct PersistentArgs {
  Dtype dtype;
  FewRows rows;
  Units units;              // of one problem
  int64_t samples;          // that are a problem each, or 0
  bool cluster;             // all blocks are one
  int64_t sample_bytes;     // of a row
  int64_t staged_steps;
  ChainArrays<4, 64> chain;
  int n_steps, K, state_size;
  bool preserve_norm;
  double precision;
  double *info, *state;  // of each problem: weights [K] and Gramian [K, K], what the rules keep
  int64_t* rng;
  double* slots;  // in memory; those of a cluster are with its blocks
  void* out;
};

constexpr int kRowsDoubles = (sizeof(FewRows) + 15) / 16 * 2, kHeaderDoubles = kRowsDoubles + 6;  // rows, seed and counter, norm

// Doubles of a block in shared memory for Gramian, weights, state and scratch of the solver: a multiple of 16 bytes.
MMFAST_HD inline int64_t solver_doubles(int K, int state_size) {
  return (K * K + K + state_size + scratch_doubles(K, state_size) + 1) / 2 * 2;
}
// All of a block's shared memory but what it stages.
template <class T>
MMFAST_HD inline int64_t fixed_bytes(int K, int state_size) {
  return (kHeaderDoubles + solver_doubles(K, state_size)) * 8 + reduce_shared_size<T>() * static_cast<int64_t>(sizeof(Acc<T>));
}

// A block's shared memory: its rows, seed and counter, norm, Gramian, weights, state and scratch of the solver; then, as its type decides, where chains are
// reduced, what is staged, and in a cluster its slots.
extern __shared__ double shared_memory[];
struct SharedMemory {
  FewRows& rows;
  int64_t* rng;
  Norm& norm;
  double *G, *w, *state, *scratch, *typed;
  __device__ explicit SharedMemory(const PersistentArgs& args)
      : rows(*reinterpret_cast<FewRows*>(shared_memory)), rng(reinterpret_cast<int64_t*>(shared_memory + kRowsDoubles)),
        norm(*reinterpret_cast<Norm*>(shared_memory + kRowsDoubles + 2)), G(shared_memory + kHeaderDoubles),
        w(G + args.K * args.K), state(w + args.K), scratch(state + args.state_size), typed(G + solver_doubles(args.K, args.state_size)) {}
  // Doubles from the solver's scratch to the end of where chains are reduced: free between the two.
  __device__ int fold_buffer_size(const PersistentArgs& args) const {
    const int reduce_doubles = args.dtype == Dtype::f64 ? reduce_shared_size<double>() : reduce_shared_size<float>() / 2;
    return static_cast<int>(typed - scratch) + reduce_doubles;
  }
  template <class T>
  __device__ Acc<T>* reduce_buffer() const {
    return reinterpret_cast<Acc<T>*>(typed);
  }
  template <class T>
  __device__ Staged<T> staged(const PersistentArgs& args) const {
    return {reinterpret_cast<T*>(reduce_buffer<T>() + reduce_shared_size<T>()), args.staged_steps, rows.k};
  }
  template <class T>
  __device__ double* slots(const PersistentArgs& args) const {
    return reinterpret_cast<double*>(staged<T>(args).ptr(args.staged_steps, 0, 0));
  }
};

// All blocks share one problem, or each has its own.
__device__ BlockChunks block_chunks(const PersistentArgs& args) { return args.samples ? BlockChunks{0, 1} : BlockChunks{blockIdx.x, gridDim.x}; }
__device__ Slots block_slots(const PersistentArgs& args) {
  if (!args.cluster) return {args.slots + (args.samples ? blockIdx.x * args.units.slots() * pair_count(args.rows.k) : 0), 0};
  double* partials = nullptr;
  with_type(args.dtype, [&](auto tag) { partials = SharedMemory(args).slots<decltype(tag)>(args); });
  return {partials, gridDim.x};
}

// The phases are functions of their own and the kernel is one: the assembler goes through all solvers once for every kernel that calls them.
// What they share is in shared memory, for a register that lives through a call is missing in it.
__device__ __noinline__ void begin_phase(const PersistentArgs& args, int64_t problem) {
  const SharedMemory memory(args);
  const int S = args.state_size, thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    memory.rows = args.rows;
    for (int i = 0; i < args.rows.k; ++i) memory.rows.ptr[i] = static_cast<const char*>(args.rows.ptr[i]) + problem * args.sample_bytes;
    if (args.rows.mask) memory.rows.mask += problem * args.rows.mask_stride;
    memory.rng[0] = args.rng ? args.rng[0] : 0, memory.rng[1] = args.rng ? args.rng[1] : 0;
  }
  for (int i = thread; i < S; i += kThreads) memory.state[i] = args.state[problem * S + i];
}

template <class T, int R>
__device__ __noinline__ void read_phase(const PersistentArgs& args) {
  const SharedMemory memory(args);
  const Staged<T> staged = memory.staged<T>(args);
  prefetch<T, R>(Block{}, memory.rows, args.units, block_chunks(args), staged);
  sum_staged<T, R>(Block{}, memory.rows, args.units, block_chunks(args), staged, memory.reduce_buffer<T>(), block_slots(args));
}

__device__ inline void scale_weights(const SharedMemory& memory, int K, double factor, int thread) {
  for (int i = thread; i < K; i += kThreads) memory.w[i] *= factor;
}

// Every block of one problem solves: the same numbers, and nobody has to wait for them; block 0 writes them.
__device__ __noinline__ void solve_phase(const PersistentArgs& args, int64_t problem) {
  const SharedMemory memory(args);
  const int K = args.K, S = args.state_size, thread = static_cast<int>(threadIdx.x);
  fold_slots_by_block(Block{}, memory.rows, K, block_slots(args), args.units.slots(), memory.scratch, memory.fold_buffer_size(args), memory.G);
  __syncthreads();
  if (args.cluster) cluster_arrive();  // this block reads no other's slots any more: those may end
  if (thread < kTeamLanes) {
    const Chain chain{args.chain.steps, args.n_steps, args.chain.params, args.preserve_norm, args.precision};
    const Io io{memory.G, memory.rows.mask, S ? memory.state : nullptr, static_cast<uint64_t>(memory.rng[0]), static_cast<uint32_t>(memory.rng[1]),
                static_cast<uint32_t>(problem), memory.w, args.preserve_norm ? &memory.norm : nullptr};
    solve(Warp{}, chain, K, io, memory.scratch, reinterpret_cast<int*>(memory.scratch + solve_work_size(K, S)));
    if (args.preserve_norm && memory.norm.settled != 0.0) scale_weights(memory, K, memory.norm.factor, thread);
  }
  __syncthreads();
  if (!args.samples && blockIdx.x) return;
  double* info = args.info + problem * (K + K * K);
  for (int i = thread; i < K; i += kThreads) info[i] = memory.w[i];  // without their factor where that is yet to be measured
  for (int i = thread; i < K * K; i += kThreads) info[K + i] = memory.G[i];
  for (int i = thread; i < S; i += kThreads) args.state[problem * S + i] = memory.state[i];
  if (thread == 0 && args.rng && !args.samples) args.rng[1] = memory.rng[1] + 1;
}

template <class T>
__device__ __noinline__ void write_phase(const PersistentArgs& args, int64_t problem) {
  const SharedMemory memory(args);
  static_assert(sizeof(ActiveRows<T>) <= reduce_shared_size<T>() * sizeof(Acc<T>), "nothing is reduced any more: the room is free");
  ActiveRows<T>& active = *reinterpret_cast<ActiveRows<T>*>(memory.typed);
  combine_staged(Block{}, memory.rows, args.units, block_chunks(args), memory.staged<T>(args), memory.w, active,
                 static_cast<T*>(args.out) + problem * args.units.elements);
}

// Where the Gramian does not know the factor that keeps the norm: every block measures its chunks, the slots of the Gramian take what it finds, and all
// blocks fold them. That is seldom, and then costs two more barriers.
__device__ inline void wait_for_all(const PersistentArgs& args) {
  if (args.samples) __syncthreads();
  else if (!args.cluster) cooperative_groups::this_grid().sync();
}

template <class T>
__device__ __noinline__ void measure_phase(const PersistentArgs& args) {
  const SharedMemory memory(args);
  const Slots slots = block_slots(args);
  static_assert(kLengthsShared * sizeof(double) <= reduce_shared_size<T>() * sizeof(Acc<T>), "lengths are reduced where chains were");
  Sums<T, FewRows> sums{memory.rows, memory.w, 0, 0, 0, nullptr, 0};
  const BlockChunks own = block_chunks(args);
  for (int64_t slot = own.block; slot < args.units.slots(); slot += own.blocks) lengths_slot(Block{}, sums, args.units, slot, memory.typed, slots.ptr(slot, 3));
}

__device__ __noinline__ void norm_phase(const PersistentArgs& args, int64_t problem) {
  const SharedMemory memory(args);
  const int K = args.K, thread = static_cast<int>(threadIdx.x);
  wait_for_all(args);  // nobody still reads the slots of the Gramian
  if (args.cluster) cluster_wait();
  with_type(args.dtype, [&](auto tag) { measure_phase<decltype(tag)>(args); });
  if (args.cluster) cluster_arrive(), cluster_wait();
  else wait_for_all(args);
  double plain = 0.0, resolved = 0.0;
  const Slots slots = block_slots(args);
  const unsigned count = static_cast<unsigned>(args.units.slots());
#pragma unroll 4
  for (unsigned s = 0; s < count; ++s) plain += slots.load(s, 3, 0), resolved += slots.load(s, 3, 2);
  if (args.cluster) cluster_arrive();
  scale_weights(memory, K, measured_factor(memory.norm, plain, resolved), thread);
  __syncthreads();
  if (!args.samples && blockIdx.x) return;
  for (int i = thread; i < K; i += kThreads) args.info[problem * (K + K * K) + i] = memory.w[i];
}

// The weighted sum where the norm was measured: in double precision, from memory.
template <class T>
__device__ __noinline__ void write_measured_phase(const PersistentArgs& args, int64_t problem) {
  const SharedMemory memory(args);
  const FewRows& rows = memory.rows;
  const int thread = static_cast<int>(threadIdx.x);
  T* out = static_cast<T*>(args.out) + problem * args.units.elements;
  const T* ptr[kPersistentRows];
  double weight[kPersistentRows];
  int count = 0;
  for (int i = 0; i < rows.k; ++i)
    if (is_active(rows, i, memory.w, rows.mask, true)) ptr[count] = static_cast<const T*>(rows.ptr[i]), weight[count++] = memory.w[rows.row_index[i]];
  block_chunks(args).for_each(args.units, [&](int64_t, int64_t chunk, int64_t) {
    for (int64_t e = chunk * kChunk + thread; e < chunk_end(args.units, chunk); e += kThreads) weighted_sum_exact<T, 1>(ptr, weight, count, e, 0, out);
  });
}

__global__ void __launch_bounds__(kThreads, kPersistentBlocksPerProcessor) persistent_kernel(const __grid_constant__ PersistentArgs args) {
  for (int64_t problem = args.samples ? blockIdx.x : 0; problem < (args.samples ? args.samples : 1); problem += gridDim.x) {
    __syncthreads();  // nobody still reads what the problem before left
    begin_phase(args, problem);
    __syncthreads();
    with_type(args.dtype, [&](auto tag) {
      using T = decltype(tag);
      if (args.rows.k <= 2) return read_phase<T, 2>(args);
      if (args.rows.k <= 4) return read_phase<T, 4>(args);
      if constexpr (sizeof(T) < 8) read_phase<T, 8>(args);
    });
    // state and counter were read before the barrier, and are written after it
    if (args.samples) __syncthreads();
    else if (args.cluster) cluster_arrive(), cluster_wait();
    else cooperative_groups::this_grid().sync();
    solve_phase(args, problem);
    if (args.preserve_norm && SharedMemory(args).norm.settled == 0.0) {
      norm_phase(args, problem);
      with_type(args.dtype, [&](auto tag) { write_measured_phase<decltype(tag)>(args, problem); });
    } else {
      with_type(args.dtype, [&](auto tag) { write_phase<decltype(tag)>(args, problem); });
    }
  }
  if (args.cluster) cluster_wait();
}

Launch launch_of(Path path, int64_t blocks, int64_t shared, gpu::Stream stream) {
  const LaunchMode mode = path == Path::cluster ? LaunchMode::cluster : path == Path::persistent ? LaunchMode::cooperative : LaunchMode::plain;
  return {mode, dim3(static_cast<unsigned>(blocks)), kThreads, stream, shared};
}

std::optional<Limits> prepare(int device) {
  bool answered = true;
  auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return true;
    cudaGetLastError();  // asking is no error of the caller's
    return answered = false;
  };
  auto attribute = [&](cudaDeviceAttr what) {
    int value = 0;
    return check(cudaDeviceGetAttribute(&value, what, device)) ? value : 0;
  };
  Limits limits{attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                attribute(cudaDevAttrCooperativeLaunch) != 0, 0, false};
  auto set_attribute = [](cudaFuncAttribute what, int64_t value) { return cudaFuncSetAttribute(persistent_kernel, what, static_cast<int>(value)); };
  cudaFuncAttributes kernel{};
  if (!answered || !check(set_attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_block)) ||
      !check(set_attribute(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) || !check(cudaFuncGetAttributes(&kernel, persistent_kernel)))
    return std::nullopt;
  if (attribute(cudaDevAttrComputeCapabilityMajor) < 9 || kernel.ptxVersion < 90) return limits;  // what was written for older GPUs knows neither
  int driver = 0;
  limits.overlap = check(cudaDriverGetVersion(&driver)) && driver >= 12030;  // that captures such launches
  if (!attribute(cudaDevAttrClusterLaunch)) return limits;
  // more than eight blocks are not promised on every device, nor that some group of processors is large enough for so many
  int clusters = 0;
  const bool non_portable = set_attribute(cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  if (!non_portable) cudaGetLastError();
  for (int64_t blocks = non_portable ? 16 : 8; blocks && !limits.cluster; blocks /= 2) {
    const Launch launch = launch_of(Path::cluster, blocks, limits.shared_block, nullptr);
    if (cudaOccupancyMaxActiveClusters(&clusters, persistent_kernel, launch.config()) == cudaSuccess && clusters) limits.cluster = blocks;
    else cudaGetLastError();
  }
  return limits;
}

// Whether those blocks that wait for each other all run at once.
bool all_resident(const Plan& plan, const Limits& limits) {
  if (plan.path != Path::persistent) return true;
  return blocks_per_processor(persistent_kernel, kThreads, plan.shared) * limits.processors >= plan.blocks;
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

Plan plan(const Grads& g, int state_size, const Limits& limits) {
  Plan found{};
  cuda::with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t fixed = cuda::fixed_bytes<T>(g.K <= kPersistentRows ? g.K : kPersistentRows, state_size);
    const bool one_problem = g.per == Per::batch && g.mask_stride == 0 && g.K <= kPersistentRows;
    found = g.per == Per::sample && g.K <= kPersistentRows ? plan_samples(g.k, g.batch, g.inner, sizeof(T), fixed, limits)
                                                           : plan_resolve(g.k, g.batch * g.inner, sizeof(T), fixed, one_problem, limits);
  });
  return found;
}

std::optional<Limits> ask(int device) { return cuda::prepare(device); }

bool resolve_fused(const Grads& g, const SolveArgs& args, int64_t* rng, const Plan& plan, const Limits& limits, double* slots, void* out, Stream stream) {
  cuda::PersistentArgs kernel_args{};
  if (!kernel_args.chain.copy(args) || !cuda::all_resident(plan, limits)) return false;
  kernel_args.rows = cuda::rows_of<kPersistentRows>(g);
  const bool samples = plan.path == Path::per_sample;
  kernel_args.units = cuda::whole_units(samples ? g.inner : g.batch * g.inner);
  kernel_args.samples = samples ? g.batch : 0;
  kernel_args.cluster = plan.path == Path::cluster;
  kernel_args.staged_steps = plan.staged_steps;
  kernel_args.n_steps = args.n_steps, kernel_args.K = args.K, kernel_args.state_size = static_cast<int>(args.state ? args.state_stride : 0);
  kernel_args.preserve_norm = args.preserve_norm, kernel_args.precision = args.precision;
  kernel_args.info = args.w, kernel_args.state = args.state, kernel_args.rng = rng, kernel_args.slots = slots;
  kernel_args.dtype = g.dtype, kernel_args.out = out;
  cuda::with_type(g.dtype, [&](auto tag) { kernel_args.sample_bytes = g.inner * static_cast<int64_t>(sizeof tag); });
  if (!cuda::launch_of(plan.path, plan.blocks, plan.shared, stream).try_start(kPathNames[static_cast<int>(plan.path)], cuda::persistent_kernel, kernel_args)) return false;
  if (samples && rng) cuda::advance(rng, stream);
  return true;
}

}  // namespace gpu
}  // namespace mmfast
