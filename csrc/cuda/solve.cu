// K x K problems on the device: a warp each, with the solvers that the CPU runs, so nothing waits for the host. For linear branches the same launch
// folds the Gramian before it and scales the factors of their product behind it.
#define MMFAST_ISA cuda
#include <cooperative_groups.h>

#include "heads.h"
#include "launch.h"
#include "warp.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kWarpsPerProcessor = 4;  // that wait for each other: their registers have room on every GPU

using LongChain = ChainArrays<gpu::kMaxSteps, gpu::kMaxParams>;

// What linear branches add to a launch; none where `partials` is null.
struct LinearArgs {
  Branches branches;
  double* partials;         // of the one problem, or of the problem that each warp has in hand
  bool samples;             // a problem each
  Dtype dtype;              // of W
  const void* delta;        // as the last product takes it, float where it was float16
  void *left, *right;       // where it goes scaled, for samples; W scaled
  int64_t sample_elements;  // of delta
  int64_t batch_sums;       // samples that are added up first, or 0
  double* has_weight;       // [K] not zero where a branch has weight in some sample
  double* lengths;          // [blocks, 2]
};

__device__ inline void grid_sync() {
  if (gridDim.x > 1) cooperative_groups::this_grid().sync();
  else __syncwarp();
}

// W times the weights of its branches. Of a branch without weight nothing is read: it may hold anything.
template <class T>
__device__ void scale_weight(const LinearArgs& linear, const double* w, int64_t thread, int64_t threads) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(linear.branches.weight.data);
  const int64_t inputs = linear.branches.weight.rows;
  for (int64_t e = thread; e < linear.branches.outputs * inputs; e += threads) {
    const int64_t head = linear.branches.head_of[e / inputs];
    const A scale = linear.samples ? A(linear.has_weight[head] != 0.0 ? 1 : 0) : static_cast<A>(w[head]);
    store_acc(static_cast<Factor<T>*>(linear.right) + e, scale != A(0) ? load_acc(weight + e) * scale : A(0));
  }
}

// A sample of delta from its first element on, times the weights of its branches.
template <class T>
__device__ void scale_sample(const LinearArgs& linear, int64_t first, const double* w, int64_t thread, int64_t threads) {
  const T* from = static_cast<const T*>(linear.delta) + first;
  T* to = static_cast<T*>(linear.left) + first;
  for (int64_t e = thread; e < linear.sample_elements; e += threads)
    store_acc(to + e, load_acc(from + e) * static_cast<Acc<T>>(w[linear.branches.head_of[e % linear.branches.outputs]]));
}

struct Lengths {
  double plain, resolved;
};

// What a thread's share of the pairs of outputs adds to the squared lengths of the plain and of the weighted sum of the branches' gradients, in double
// precision: of `sample`, or of all there are.
template <class W>
__device__ Lengths lengths_of_pairs(const LinearArgs& linear, int64_t sample, const double* w, int64_t thread, int64_t threads) {
  const Branches& h = linear.branches;
  const MatrixView &delta = h.delta, &weight = h.weight;
  const Factor<W>* deltas = static_cast<const Factor<W>*>(linear.delta) + (linear.samples ? sample * linear.sample_elements : 0);
  const W* weights = static_cast<const W*>(weight.data);
  const int64_t batch = linear.batch_sums ? linear.batch_sums : 1;
  auto sent = [&](int64_t row, int64_t output) {
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b) sum += static_cast<double>(load_acc(deltas + b * linear.sample_elements + row * h.outputs + output));
    return sum;
  };
  Lengths sum{0.0, 0.0};
  for (int64_t e = thread; e < h.outputs * h.outputs; e += threads) {
    const int64_t i = e / h.outputs, j = e % h.outputs;
    if (j < i) continue;
    double product = 0.0, of_weights = 0.0;
    for (int64_t r = 0; r < delta.rows; ++r) product = fma_rn(sent(r, i), sent(r, j), product);
    if (product == 0.0) continue;  // weights of a branch that sends nothing may be anything
    for (int64_t r = 0; r < weight.rows; ++r)
      of_weights = fma_rn(static_cast<double>(load_acc(weights + i * weight.rows + r)), static_cast<double>(load_acc(weights + j * weight.rows + r)), of_weights);
    product *= (i == j ? 1.0 : 2.0) * of_weights;
    sum.plain += product;
    sum.resolved += w[h.head_of[i]] * w[h.head_of[j]] * product;
  }
  return sum;
}

// The factor that keeps the norm of the branches' gradients, from the squared lengths that the threads of a warp have parts of.
__device__ __noinline__ Lengths measure_pairs(const LinearArgs& linear, int64_t sample, const double* w, int64_t thread, int64_t threads) {
  Lengths own{0.0, 0.0};
  with_type(linear.dtype, [&](auto tag) { own = lengths_of_pairs<decltype(tag)>(linear, sample, w, thread, threads); });
  const Warp warp;
  return {warp.sum(kTeamLanes, [&](int) { return own.plain; }), warp.sum(kTeamLanes, [&](int) { return own.resolved; })};
}

// One warp and its sample.
__device__ inline void keep_norm_of_sample(const LinearArgs& linear, int64_t sample, const Norm& norm, const double* raw, double* w, int K) {
  const Warp warp;
  const Lengths found = measure_pairs(linear, sample, raw, warp.rank(), warp.size());
  const double factor = measured_factor(norm, fmax(found.plain, 0.0), fmax(found.resolved, 0.0));
  for (int i = warp.rank(); i < K; i += warp.size()) w[i] = raw[i] * factor;
  __syncwarp();
}

// All warps and the one problem.
__device__ inline void keep_norm_of_heads(const LinearArgs& linear, const SolveArgs& args, int64_t thread, int64_t threads) {
  const Warp warp;
  const Lengths own = measure_pairs(linear, 0, args.raw_w, thread, threads);
  double* lengths = linear.lengths;
  if (warp.rank() == 0) lengths[2 * blockIdx.x] = own.plain, lengths[2 * blockIdx.x + 1] = own.resolved;
  grid_sync();
  const int blocks = static_cast<int>(gridDim.x);
  const double plain = warp.sum(blocks, [&](int b) { return lengths[2 * b]; }), resolved = warp.sum(blocks, [&](int b) { return lengths[2 * b + 1]; });
  const double factor = measured_factor(*reinterpret_cast<const Norm*>(args.norm), fmax(plain, 0.0), fmax(resolved, 0.0));
  for (int64_t i = thread; i < args.K; i += threads) args.w[i] = args.raw_w[i] * factor;
  grid_sync();
}

// The first `solvers` warps share out the problems.
__global__ void solve_kernel(const __grid_constant__ LongChain chain, const __grid_constant__ SolveArgs args, const __grid_constant__ LinearArgs linear, const int64_t* rng,
                             int64_t solvers, int64_t scratch, double* workspace) {
  __shared__ int begin[kMaxRows + 1];
  const Warp warp;
  const int rank = warp.rank(), size = warp.size();
  const int64_t thread = blockIdx.x * int64_t{kTeamLanes} + rank, threads = gridDim.x * int64_t{kTeamLanes};
  double* work = workspace + blockIdx.x * scratch;
  const BranchPartials partials{linear.partials + (linear.samples ? blockIdx.x * BranchPartials::size(args.K, linear.branches.outputs) : 0), linear.branches.outputs, args.K};
  if (!linear.partials) grid_dependency_launch();
  grid_dependency_wait();
  if (linear.partials) {
    find_branches(linear.branches, rank, size, begin);
    __syncwarp();
    if (!linear.samples) {
      auto product = [&](int64_t i, int64_t j) { return fold_products(linear.branches.delta, linear.branches.delta_products, i, j); };
      store_partials(linear.branches, begin, product, thread, threads, partials);
      grid_sync();
    }
  }
  const Chain c{chain.steps, args.n_steps, chain.params, args.preserve_norm, args.precision};
  const int state_size = args.state ? static_cast<int>(args.state_stride) : 0;
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint32_t counter = rng ? static_cast<uint32_t>(rng[1]) : 0;
  for (int64_t b = blockIdx.x < solvers ? blockIdx.x : args.batch; b < args.batch; b += solvers) {
    double* w = args.w + b * args.w_stride;
    if (linear.samples) {
      with_type(linear.branches.delta.dtype, [&](auto tag) {  // never float16
        const auto* sample = static_cast<const decltype(tag)*>(linear.delta) + b * linear.sample_elements;
        auto product = [&](int64_t i, int64_t j) { return column_product(linear.branches.delta, sample, i, j); };
        store_partials(linear.branches, begin, product, rank, size, partials);
      });
      __syncwarp();
    }
    if (linear.partials) {
      store_gramian(begin, args.precision, partials, rank, size, const_cast<double*>(args.G) + b * args.G_stride);
      __syncwarp();
    }
    const Io io{args.G + b * args.G_stride, args.mask ? args.mask + b * args.mask_stride : nullptr,
                args.state ? args.state + b * args.state_stride : nullptr, seed, counter, static_cast<uint32_t>(b), w,
                args.norm ? reinterpret_cast<Norm*>(args.norm) + b : nullptr};
    solve(warp, c, args.K, io, work, reinterpret_cast<int*>(work + solve_work_size(args.K, state_size)));
    __syncwarp();
    if (args.norm) {
      for (int i = rank; i < args.K; i += size) {
        args.raw_w[b * args.K + i] = w[i];
        if (io.norm->settled != 0.0) w[i] *= io.norm->factor;
      }
      __syncwarp();
      if (linear.samples && io.norm->settled == 0.0) keep_norm_of_sample(linear, b, *io.norm, args.raw_w + b * args.K, w, args.K);
    }
    if (!linear.samples) continue;
    with_type(linear.branches.delta.dtype, [&](auto tag) { scale_sample<decltype(tag)>(linear, b * linear.sample_elements, w, rank, size); });
    for (int a = rank; a < args.K; a += size)
      if (w[a] != 0.0) linear.has_weight[a] = 1.0;
  }
  if (!linear.partials) return;
  grid_sync();
  if (args.norm && !linear.samples && reinterpret_cast<const Norm*>(args.norm)->settled == 0.0) keep_norm_of_heads(linear, args, thread, threads);
  with_type(linear.dtype, [&](auto tag) { scale_weight<decltype(tag)>(linear, args.w, thread, threads); });
}

int64_t scratch_of(const SolveArgs& args) { return scratch_doubles(args.K, args.state ? static_cast<int>(args.state_stride) : 0); }

int64_t warps_of(const SolveArgs& args) { return solver_warps(args.batch, scratch_of(args)); }

LongChain chain_of(const SolveArgs& args) {
  LongChain chain{};
  if (!chain.copy(args)) throw std::runtime_error("mmfast: a chain of at most 16 rules with at most 1024 numbers among them runs on the GPU");
  return chain;
}

// That of Factor<T>.
Dtype factor_type(Dtype dtype) { return dtype == Dtype::f16 ? Dtype::f32 : dtype; }

// What the Gramian is formed from: delta, a sample of it or its sum, and W.
Branches branches_of(const Heads& h, const int64_t* head_of, const void* delta) {
  const bool sums = h.per == Per::batch_sum;
  const Dtype type = factor_type(h.dtype), acc_type = h.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t O = h.outputs;
  return {head_of, O, h.K, {sums ? acc_type : type, delta, h.per == Per::batch ? h.batch * h.rows : h.rows, O, O, 1}, {h.dtype, h.weight, h.inputs, O, 1, h.inputs}, nullptr, nullptr};
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

int64_t solve_workspace(const SolveArgs& args) { return cuda::warps_of(args) * cuda::scratch_of(args); }

void solve(const SolveArgs& args, int64_t* rng, double* workspace, bool overlap, Stream stream) {
  const cuda::LongChain chain = cuda::chain_of(args);
  if (args.batch) {
    cuda::Launch(cuda::dependent_if(overlap), static_cast<unsigned>(cuda::warps_of(args)), cuda::kTeamLanes, stream)
        .start("solve", cuda::solve_kernel, chain, args, cuda::LinearArgs{}, rng, cuda::warps_of(args), cuda::scratch_of(args), workspace);
  }
  if (rng) cuda::advance(rng, stream);
}

HeadsPlan plan_heads(const Heads& h, const SolveArgs& args, const Limits& limits) {
  const cuda::Branches b = cuda::branches_of(h, nullptr, nullptr);
  const bool samples = h.per == Per::sample;
  // enough to fold the partial sums of one problem, to solve those of samples, and to scale W
  const int64_t work = h.outputs * ((samples ? 0 : h.K / 2) + h.inputs / 8) / cuda::kTeamLanes + 1, solvers = cuda::warps_of(args), wanted = work < solvers ? solvers : work;
  const int fitting = limits.cooperative ? cuda::blocks_per_processor(cuda::solve_kernel, cuda::kTeamLanes, 0) : 0;
  const int64_t resident = (fitting < cuda::kWarpsPerProcessor ? fitting : cuda::kWarpsPerProcessor) * limits.processors, max_warps = resident < 1 ? 1 : resident;
  HeadsPlan plan{wanted < max_warps ? wanted : max_warps, solvers < max_warps ? solvers : max_warps, 0};
  const int64_t slots = (samples ? 0 : b.delta.slots()) + b.weight.slots();
  plan.workspace = slots * h.outputs * h.outputs + (samples ? plan.solvers : 1) * cuda::BranchPartials::size(h.K, h.outputs) + h.K + plan.solvers * cuda::scratch_of(args) + 2 * plan.warps;
  return plan;
}

void heads(const Heads& h, const int64_t* head_of, const SolveArgs& args, int64_t* rng, const HeadsPlan& plan, double* workspace, void* sums, void* left, void* right, Stream stream) {
  const cuda::LongChain chain = cuda::chain_of(args);
  const bool samples = h.per == Per::sample, copies = h.mask || h.dtype == Dtype::f16;
  if (copies) cuda::mask_delta(h, head_of, left, stream);
  const void* delta = copies ? left : h.delta;
  cuda::LinearArgs linear{};
  linear.branches = cuda::branches_of(h, head_of, delta);
  if (h.per == Per::batch_sum) {
    const int row_index = 0;
    batch_sums({cuda::factor_type(h.dtype), &delta, 1, &row_index, 1, h.batch, h.rows * h.outputs, h.per, nullptr, 0}, sums, stream);
    linear.branches.delta.data = sums;
  }
  const int64_t size = h.outputs * h.outputs, delta_slots = samples ? 0 : linear.branches.delta.slots();
  cuda::multiply_columns(linear.branches.delta, linear.branches.weight, !samples, workspace, stream);
  linear.branches.delta_products = workspace;
  linear.branches.weight_products = workspace + delta_slots * size;
  linear.partials = workspace + (delta_slots + linear.branches.weight.slots()) * size;
  linear.has_weight = linear.partials + (samples ? plan.solvers : 1) * cuda::BranchPartials::size(h.K, h.outputs);
  linear.samples = samples, linear.dtype = h.dtype, linear.delta = delta, linear.left = left, linear.right = right, linear.sample_elements = h.rows * h.outputs;
  linear.batch_sums = h.per == Per::batch_sum ? h.batch : 0;
  linear.lengths = linear.has_weight + h.K + plan.solvers * cuda::scratch_of(args);
  if (samples) {
    cuda::check_launch(cudaMemsetAsync(linear.has_weight, 0, sizeof(double) * h.K, cuda::cuda_stream(stream)), "memset");
  }
  auto starts = [&](int64_t warps) {
    const cuda::LaunchMode mode = warps > 1 ? cuda::LaunchMode::cooperative : cuda::LaunchMode::plain;
    const int64_t solvers = plan.solvers < warps ? plan.solvers : warps;
    return cuda::Launch(mode, static_cast<unsigned>(warps), cuda::kTeamLanes, stream)
        .try_start("heads", cuda::solve_kernel, chain, args, linear, rng, solvers, cuda::scratch_of(args), linear.has_weight + h.K);
  };
  int64_t warps = plan.warps;  // or fewer, until they have room: one alone waits for nobody
  while (!starts(warps)) {
    if (warps == 1) throw std::runtime_error("mmfast: the device has no room for one warp of the CUDA kernel heads");
    warps /= 2;
  }
  if (rng) cuda::advance(rng, stream);
}

}  // namespace gpu
}  // namespace mmfast
