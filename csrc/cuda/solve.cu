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
  const void* sent;        // delta as the last product takes it
  void *left, *right;      // where it goes scaled, for samples; W scaled
  int64_t count, sample;   // numbers of delta, and of a sample of it
  int64_t inputs;
  double* any;             // [K] not zero where a branch has weight in some sample
};

__device__ inline void meet() {
  if (gridDim.x > 1) cooperative_groups::this_grid().sync();
  else __syncwarp();
}

// Numbers of left and right times the weights of their branches. Of a branch without weight nothing is read: it may hold anything.
template <class T>
__device__ void scale_factors(const Factors& f, const SolveArgs& args, int64_t thread, int64_t threads) {
  using A = Acc<T>;
  using P = std::conditional_t<std::is_same_v<T, Half>, float, T>;
  const int64_t* head_of = f.branches.head_of;
  const int64_t O = f.branches.outputs;
  const T* weight = static_cast<const T*>(f.branches.weight.data);
  for (int64_t e = thread; e < O * f.inputs; e += threads) {
    const int64_t head = head_of[e / f.inputs];
    const A scale = f.samples ? A(f.any[head] != 0.0 ? 1 : 0) : static_cast<A>(args.w[head]);
    put(static_cast<P*>(f.right) + e, scale != A(0) ? number(weight + e) * scale : A(0));
  }
  if (!f.samples) return;
  for (int64_t e = thread; e < f.count; e += threads) {
    const A x = number(static_cast<const P*>(f.sent) + e) * static_cast<A>(args.w[e / f.sample * args.w_stride + head_of[e % O]]);
    put(static_cast<P*>(f.left) + e, x);
  }
}

__global__ void solve_kernel(const __grid_constant__ AllSteps chain, const __grid_constant__ SolveArgs args, const __grid_constant__ Factors f, const int64_t* rng, int64_t scratch,
                             double* workspace) {
  __shared__ int begin[kMaxRows + 1];
  const Warp warp;
  const int64_t thread = blockIdx.x * int64_t{kTeamLanes} + warp.rank(), threads = gridDim.x * int64_t{kTeamLanes};
  const int64_t outputs = f.branches.outputs;
  double *work = workspace + blockIdx.x * scratch, *parts = f.parts + (f.samples ? blockIdx.x * parts_size(args.K, outputs) : 0);
  let_next_begin();
  wait_for_previous();
  if (f.parts) {
    find_branches(f.branches, warp.rank(), warp.size(), begin);
    __syncwarp();
    if (!f.samples) {
      put_parts(f.branches, begin, [&](int64_t i, int64_t j) { return fold_products(f.branches.sent, f.branches.deltas, i, j); }, thread, threads, parts);
      meet();
    }
  }
  const Chain c{chain.steps, args.n_steps, chain.params, args.preserve_norm, args.precision};
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint32_t counter = rng ? static_cast<uint32_t>(rng[1]) : 0;
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    if (f.samples) {
      with_type(f.branches.sent.dtype, [&](auto zero) {
        const auto* sample = static_cast<const decltype(zero)*>(f.sent) + b * f.sample;
        put_parts(f.branches, begin, [&](int64_t i, int64_t j) { return multiply_columns(f.branches.sent, sample, i, j); }, warp.rank(), warp.size(), parts);
      });
      __syncwarp();
    }
    if (f.parts) {
      put_gramian(f.branches, begin, args.precision, parts, warp.rank(), warp.size(), const_cast<double*>(args.G) + b * args.G_stride);
      __syncwarp();
    }
    const Io io{args.G + b * args.G_stride, args.mask ? args.mask + b * args.mask_stride : nullptr,
                args.state ? args.state + b * args.state_stride : nullptr, seed, counter, static_cast<uint32_t>(b), args.w + b * args.w_stride};
    solve(warp, c, args.K, io, work, reinterpret_cast<int*>(work + solve_work_size(args.K)));
    __syncwarp();
    for (int a = warp.rank(); f.samples && a < args.K; a += warp.size())
      if (args.w[b * args.w_stride + a] != 0.0) f.any[a] = 1.0;
  }
  if (!f.parts) return;
  meet();
  with_type(f.dtype, [&](auto zero) { scale_factors<decltype(zero)>(f, args, thread, threads); });
}

int64_t warps_of(const SolveArgs& args) {
  const int64_t room = kMostScratch / scratch_doubles(args.K), most = room < kMostWarps ? room : kMostWarps;
  return args.batch < most ? args.batch : most;
}

// Of one problem enough to fold its parts and scale its weights, of samples one each, and no more than can wait for each other.
int64_t warps_of(const Heads& h, const SolveArgs& args, const Limits& limits) {
  const int64_t work = h.outputs * (h.K / 2 + h.inputs / 8) / kTeamLanes + 1, wanted = h.per == Per::sample ? warps_of(args) : work;
  const int64_t most = limits.cooperative ? kWarpsPerProcessor * limits.processors : 1;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
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
                cuda::scratch_doubles(args.K), workspace);
    cuda::check_launch("solve");
  }
  if (rng) cuda::advance(rng, stream);
}

int64_t heads_workspace(const Heads& h, const SolveArgs& args, const Limits& limits) {
  const cuda::Branches b = cuda::branches_of(h, nullptr, nullptr);
  const bool samples = h.per == Per::sample;
  const int64_t slots = (samples ? 0 : b.sent.slots()) + b.weight.slots(), warps = cuda::warps_of(h, args, limits);
  return slots * h.outputs * h.outputs + (samples ? warps : 1) * (cuda::parts_size(h.K, h.outputs) + cuda::scratch_doubles(h.K)) + h.K;
}

void heads(const Heads& h, const int64_t* head_of, const SolveArgs& args, int64_t* rng, const Limits& limits, double* workspace, void* sums, void* left, void* right, Stream stream) {
  const cuda::AllSteps chain = cuda::steps_of(args);
  const bool samples = h.per == Per::sample, sent_first = h.mask || h.dtype == Dtype::f16;
  if (sent_first) send(h, head_of, left, stream);
  const void* sent = sent_first ? left : h.delta;
  cuda::Factors f{};
  f.branches = cuda::branches_of(h, head_of, sent);
  if (h.per == Per::batch_sum) {
    const int place = 0;
    batch_sums({cuda::product_type(h.dtype), &sent, 1, &place, 1, h.batch, h.rows * h.outputs, h.per, nullptr, 0}, sums, stream);
    f.branches.sent.data = sums;
  }
  const int64_t size = h.outputs * h.outputs, sent_slots = samples ? 0 : f.branches.sent.slots(), warps = cuda::warps_of(h, args, limits);
  cuda::multiply(f.branches.sent, f.branches.weight, !samples, workspace, stream);
  f.branches.deltas = workspace;
  f.branches.weights = workspace + sent_slots * size;
  f.parts = workspace + (sent_slots + f.branches.weight.slots()) * size;
  f.any = f.parts + (samples ? warps : 1) * cuda::parts_size(h.K, h.outputs);
  double* scratch = f.any + h.K;
  f.samples = samples, f.dtype = h.dtype, f.sent = sent, f.left = left, f.right = right;
  f.count = h.batch * h.rows * h.outputs, f.sample = h.rows * h.outputs, f.inputs = h.inputs;
  if (samples) cudaMemsetAsync(f.any, 0, sizeof(double) * h.K, cuda::raw(stream));
  auto launch = [&](int64_t blocks) {
    return cuda::start(blocks > 1 ? cuda::Begin::together : cuda::Begin::after, dim3(static_cast<unsigned>(blocks)), cuda::kTeamLanes, cuda::raw(stream), cuda::solve_kernel, chain, args,
                       f, rng, cuda::scratch_doubles(h.K), scratch);
  };
  if (launch(warps) == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // part of the device is not ours, and nothing has run
    launch(1);
  }
  cuda::check_launch("heads");
  if (rng) cuda::advance(rng, stream);
}

}  // namespace gpu
}  // namespace mmfast
