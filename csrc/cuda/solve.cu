// K x K problems on the device: a warp each, with the solvers that the CPU runs, so nothing waits for the host.
#define MMFAST_ISA cuda
#include "warp.h"

#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kMostWarps = 1024;            // that solve at once, each with scratch of its own,
constexpr int64_t kMostScratch = int64_t{1} << 25;  // of so many doubles for all

using AllSteps = Steps<gpu::kMaxSteps, gpu::kMaxParams>;

__global__ void solve_kernel(const __grid_constant__ AllSteps chain, const __grid_constant__ SolveArgs args, const int64_t* rng, int64_t scratch, double* workspace) {
  double* work = workspace + blockIdx.x * scratch;
  const Chain c{chain.steps, args.n_steps, chain.params, args.preserve_norm, args.precision};
  const uint64_t seed = rng ? static_cast<uint64_t>(rng[0]) : 0;
  const uint32_t counter = rng ? static_cast<uint32_t>(rng[1]) : 0;
  for (int64_t b = blockIdx.x; b < args.batch; b += gridDim.x) {
    const Io io{args.G + b * args.G_stride, args.mask ? args.mask + b * args.mask_stride : nullptr,
                args.state ? args.state + b * args.state_stride : nullptr, seed, counter, static_cast<uint32_t>(b), args.w + b * args.w_stride};
    solve(Warp{}, c, args.K, io, work, reinterpret_cast<int*>(work + solve_work_size(args.K)));
    __syncwarp();
  }
}

int64_t warps_of(const SolveArgs& args) {
  const int64_t room = kMostScratch / scratch_doubles(args.K), most = room < kMostWarps ? room : kMostWarps;
  return args.batch < most ? args.batch : most;
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

int64_t solve_workspace(const SolveArgs& args) { return cuda::warps_of(args) * cuda::scratch_doubles(args.K); }

void solve(const SolveArgs& args, int64_t* rng, double* workspace, Stream stream) {
  cuda::AllSteps chain{};
  if (!chain.take(args)) throw std::runtime_error("mmfast: a chain of at most 16 rules with at most 1024 numbers among them runs on the GPU");
  if (args.batch) {
    cuda::solve_kernel<<<static_cast<unsigned>(cuda::warps_of(args)), cuda::kTeamLanes, 0, cuda::raw(stream)>>>(chain, args, rng, cuda::scratch_doubles(args.K), workspace);
    cuda::check_launch("solve");
  }
  if (rng) cuda::advance(rng, stream);
}

}  // namespace gpu
}  // namespace mmfast
