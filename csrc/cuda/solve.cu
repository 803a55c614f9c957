// K x K problems on the device: a warp each, with the solvers that the CPU runs, so nothing waits for the host. For linear branches the same launch
// folds the Gramian before it and scales the factors of their product behind it.
#define MMFAST_ISA cuda
#include <cooperative_groups.h>

#include <type_traits>

#include "heads.h"
#include "launch.h"
#include "warp.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kMostWarps = 1024;            // that solve at once, each with scratch of its own,
constexpr int64_t kMostScratch = int64_t{1} << 25;  // of so many doubles for all
constexpr int64_t kWarpsPerProcessor = 4;       // that wait for each other: their registers have room on every GPU

using AllSteps = Steps<gpu::kMaxSteps, gpu::kMaxParams>;

// What linear branches add to a launch; none where `parts` is null.
struct Factors {
  Branches branches;
  double* parts;           // of the one problem, or of the problem that each warp has in hand
  bool samples;            // a problem each
  Dtype dtype;             // of W
  const void* factor;      // delta as the last product takes it, float where it was float16
  void *left, *right;      // where it goes scaled, for samples; W scaled
  int64_t sample;          // numbers of a sample of delta
  double* used;            // [K] not zero where a branch has weight in some sample
};

__device__ inline void meet() {
  if (gridDim.x > 1) cooperative_groups::this_grid().sync();
  else __syncwarp();
}

// W times the weights of its branches. Of a branch without weight nothing is read: it may hold anything.
template <class T>
__device__ void scale_weight(const Factors& f, const double* w, int64_t thread, int64_t threads) {
  using A = Acc<T>;
  using P = std::conditional_t<std::is_same_v<T, Half>, float, T>;
  const T* weight = static_cast<const T*>(f.branches.weight.data);
  const int64_t inputs = f.branches.weight.rows;
  for (int64_t e = thread; e < f.branches.outputs * inputs; e += threads) {
    const int64_t head = f.branches.head_of[e / inputs];
    const A scale = f.samples ? A(f.used[head] != 0.0 ? 1 : 0) : static_cast<A>(w[head]);
    put(static_cast<P*>(f.right) + e, scale != A(0) ? number(weight + e) * scale : A(0));
  }
}

// A sample of delta from its first number on, times the weights of its branches.
template <class P>
__device__ void scale_sample(const Factors& f, int64_t first, const double* w, int64_t thread, int64_t threads) {
  const P* from = static_cast<const P*>(f.factor) + first;
  P* to = static_cast<P*>(f.left) + first;
  for (int64_t e = thread; e < f.sample; e += threads) put(to + e, number(from + e) * static_cast<Acc<P>>(w[f.branches.head_of[e % f.branches.outputs]]));
}

// The first `solvers` warps share out the problems.
__global__ void solve_kernel(const __grid_constant__ AllSteps chain, const __grid_constant__ SolveArgs args, const __grid_constant__ Factors f, const int64_t* rng, int64_t solvers,
                             int64_t scratch, double* workspace) {
  __shared__ int begin[kMaxRows + 1];
  const Warp warp;
  const int rank = warp.rank(), size = warp.size();
  const int64_t thread = blockIdx.x * int64_t{kTeamLanes} + rank, threads = gridDim.x * int64_t{kTeamLanes};
  double* work = workspace + blockIdx.x * scratch;
  const Parts parts{f.parts + (f.samples ? blockIdx.x * Parts::size(args.K, f.branches.outputs) : 0), f.branches.outputs, args.K};
  if (!f.parts) let_next_begin();
  wait_for_previous();
  if (f.parts) {
    find_branches(f.branches, rank, size, begin);
    __syncwarp();
    if (!f.samples) {
      put_parts(f.branches, begin, [&](int64_t i, int64_t j) { return fold_products(f.branches.sent, f.branches.deltas, i, j); }, thread, threads, parts);
      meet();
    }
  }
  const Chain c{chain.steps, args.n_steps, chain.params, args.preserve_norm, args.precision};
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint32_t counter = rng ? static_cast<uint32_t>(rng[1]) : 0;
  for (int64_t b = blockIdx.x < solvers ? blockIdx.x : args.batch; b < args.batch; b += solvers) {
    double* w = args.w + b * args.w_stride;
    if (f.samples) {
      with_type(f.branches.sent.dtype, [&](auto zero) {  // never float16
        const auto* sample = static_cast<const decltype(zero)*>(f.factor) + b * f.sample;
        put_parts(f.branches, begin, [&](int64_t i, int64_t j) { return multiply_columns(f.branches.sent, sample, i, j); }, rank, size, parts);
      });
      __syncwarp();
    }
    if (f.parts) {
      put_gramian(begin, args.precision, parts, rank, size, const_cast<double*>(args.G) + b * args.G_stride);
      __syncwarp();
    }
    const Io io{args.G + b * args.G_stride, args.mask ? args.mask + b * args.mask_stride : nullptr,
                args.state ? args.state + b * args.state_stride : nullptr, seed, counter, static_cast<uint32_t>(b), w};
    solve(warp, c, args.K, io, work, reinterpret_cast<int*>(work + solve_work_size(args.K)));
    __syncwarp();
    if (!f.samples) continue;
    with_type(f.branches.sent.dtype, [&](auto zero) { scale_sample<decltype(zero)>(f, b * f.sample, w, rank, size); });
    for (int a = rank; a < args.K; a += size)
      if (w[a] != 0.0) f.used[a] = 1.0;
  }
  if (!f.parts) return;
  meet();
  with_type(f.dtype, [&](auto zero) { scale_weight<decltype(zero)>(f, args.w, thread, threads); });
}

int64_t warps_of(const SolveArgs& args) {
  const int64_t room = kMostScratch / scratch_doubles(args.K), most = room < kMostWarps ? room : kMostWarps;
  return args.batch < most ? args.batch : most;
}

AllSteps steps_of(const SolveArgs& args) {
  AllSteps chain{};
  if (!chain.take(args)) throw std::runtime_error("mmfast: a chain of at most 16 rules with at most 1024 numbers among them runs on the GPU");
  return chain;
}

Dtype product_type(Dtype dtype) { return dtype == Dtype::f16 ? Dtype::f32 : dtype; }

// What the Gramian is formed from: delta, a sample of it or its sum, and W.
Branches branches_of(const Heads& h, const int64_t* head_of, const void* sent) {
  const bool sums = h.per == Per::batch_sum;
  const Dtype type = product_type(h.dtype), wide = h.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t O = h.outputs;
  return {head_of, O, h.K, {sums ? wide : type, sent, h.per == Per::batch ? h.batch * h.rows : h.rows, O, O, 1}, {h.dtype, h.weight, h.inputs, O, 1, h.inputs}, nullptr, nullptr};
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

int64_t solve_workspace(const SolveArgs& args) { return cuda::warps_of(args) * cuda::scratch_doubles(args.K); }

void solve(const SolveArgs& args, int64_t* rng, double* workspace, bool overlap, Stream stream) {
  const cuda::AllSteps chain = cuda::steps_of(args);
  if (args.batch) {
    cuda::start(cuda::soon(overlap), dim3(static_cast<unsigned>(cuda::warps_of(args))), cuda::kTeamLanes, cuda::raw(stream), cuda::solve_kernel, chain, args, cuda::Factors{}, rng,
                cuda::warps_of(args), cuda::scratch_doubles(args.K), workspace);
    cuda::check_launch("solve");
  }
  if (rng) cuda::advance(rng, stream);
}

HeadsPlan plan_heads(const Heads& h, const SolveArgs& args, const Limits& limits) {
  const cuda::Branches b = cuda::branches_of(h, nullptr, nullptr);
  const bool samples = h.per == Per::sample;
  // enough to fold the parts of one problem, to solve those of samples, and to scale W
  const int64_t work = h.outputs * ((samples ? 0 : h.K / 2) + h.inputs / 8) / cuda::kTeamLanes + 1, solvers = cuda::warps_of(args), wanted = work < solvers ? solvers : work;
  int fitting = 0;
  if (limits.cooperative && cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, cuda::solve_kernel, cuda::kTeamLanes, 0) != cudaSuccess) cudaGetLastError();
  const int64_t most = (fitting < cuda::kWarpsPerProcessor ? fitting : cuda::kWarpsPerProcessor) * limits.processors, room = most < 1 ? 1 : most;
  HeadsPlan plan{wanted < room ? wanted : room, solvers < room ? solvers : room, 0};
  const int64_t slots = (samples ? 0 : b.sent.slots()) + b.weight.slots();
  plan.workspace = slots * h.outputs * h.outputs + (samples ? plan.solvers : 1) * cuda::Parts::size(h.K, h.outputs) + h.K + plan.solvers * cuda::scratch_doubles(h.K);
  return plan;
}

void heads(const Heads& h, const int64_t* head_of, const SolveArgs& args, int64_t* rng, const HeadsPlan& plan, double* workspace, void* sums, void* left, void* right, Stream stream) {
  const cuda::AllSteps chain = cuda::steps_of(args);
  const bool samples = h.per == Per::sample, sent_first = h.mask || h.dtype == Dtype::f16;
  if (sent_first) cuda::send(h, head_of, left, stream);
  const void* sent = sent_first ? left : h.delta;
  cuda::Factors f{};
  f.branches = cuda::branches_of(h, head_of, sent);
  if (h.per == Per::batch_sum) {
    const int place = 0;
    batch_sums({cuda::product_type(h.dtype), &sent, 1, &place, 1, h.batch, h.rows * h.outputs, h.per, nullptr, 0}, sums, stream);
    f.branches.sent.data = sums;
  }
  const int64_t size = h.outputs * h.outputs, sent_slots = samples ? 0 : f.branches.sent.slots();
  cuda::multiply(f.branches.sent, f.branches.weight, !samples, workspace, stream);
  f.branches.deltas = workspace;
  f.branches.weights = workspace + sent_slots * size;
  f.parts = workspace + (sent_slots + f.branches.weight.slots()) * size;
  f.used = f.parts + (samples ? plan.solvers : 1) * cuda::Parts::size(h.K, h.outputs);
  f.samples = samples, f.dtype = h.dtype, f.factor = sent, f.left = left, f.right = right, f.sample = h.rows * h.outputs;
  if (samples) {
    cudaMemsetAsync(f.used, 0, sizeof(double) * h.K, cuda::raw(stream));
    cuda::check_launch("memset");
  }
  cuda::start(plan.warps > 1 ? cuda::Begin::together : cuda::Begin::after, dim3(static_cast<unsigned>(plan.warps)), cuda::kTeamLanes, cuda::raw(stream), cuda::solve_kernel, chain, args, f,
              rng, plan.solvers, cuda::scratch_doubles(h.K), f.used + h.K);
  cuda::check_launch("heads");
  if (rng) cuda::advance(rng, stream);
}

}  // namespace gpu
}  // namespace mmfast
