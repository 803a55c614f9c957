// What ops_cuda.cpp asks of the CUDA code: launches in the given stream, on the current device, nothing that waits for the GPU.
// Nothing here names torch, and workspaces come from the caller.
#pragma once

#include <cstdint>
#include <optional>

#include "../args.h"
#include "architectures.h"
#include "plan.h"

namespace mmfast {
namespace gpu {

using Stream = void*;

// The numbers of a chain of rules, small enough to travel as a kernel's argument.
constexpr int kMaxSteps = 16, kMaxParams = 1024;

// How a Gramian is summed: slots of every problem, and the doubles that they take.
struct SlotPlan {
  int64_t slots;         // of all problems
  int64_t per_problem;
  int64_t workspace;     // doubles for gram()
};
SlotPlan plan_slots(const Grads& g);

// sums [k, inner] over the batch, in accumulator precision, masked samples left out: what per = batch_sum takes the Gramian of.
void batch_sums(const Grads& g, void* sums, Stream stream);
// G [K, K] of problem b at G + b * G_stride. Here and below, with `overlap` a kernel is started while the one before it in the stream ends (Limits).
void gram(const Grads& g, double* workspace, double* G, int64_t G_stride, bool overlap, Stream stream);
// Only the diagonal: 1 where a row has a non-zero element.
void presence(const Grads& g, double* G, int64_t G_stride, Stream stream);

int64_t solve_workspace(const SolveArgs& args);  // doubles
// Pointers of args are the device's, but for steps and params; `rng` (seed, counter) on the device moves on, or is null.
void solve(const SolveArgs& args, int64_t* rng, double* workspace, bool overlap, Stream stream);

// Slots of lengths() to a problem.
int64_t lengths_slots(const Grads& g);
// Squared lengths of the plain and of the weighted sum of those problems that norm [problems, 3] (solvers/norm.h) has not settled, or of all where it is
// null: slots [problems, lengths_slots, 3], of which fold_lengths makes total [problems, 3].
void lengths(const Grads& g, const double* norm, const double* w, int64_t w_stride, double* slots, bool overlap, Stream stream);
void fold_lengths(const double* slots, int64_t count, int64_t problems, double* total, Stream stream);

// What combine() needs of problems whose lengths were measured; nothing where norm is null.
struct MeasuredNorm {
  const void* norm;           // [problems, 3], solvers/norm.h
  const double* raw;          // [problems, K] weights without their factor
  const double* slots;        // of lengths()
  int64_t slots_per_problem;
  int64_t w_stride;           // not zero where problems are samples
  int K;
};
// w of problem b at w + b * w_stride; rows of weight zero are not read when `skip`. Weights of problems that were measured get their factor.
void combine(const Grads& g, double* w, int64_t w_stride, bool skip, const MeasuredNorm& norm, void* out, bool overlap, Stream stream);

// Why kernels of this library cannot run on a device, or null; the words last until the thread asks again.
const char* why_not(int device);
// None as well where why_not() says so.
Code code(int device);
const char* architectures();

// What the current device has, when the kernel is made ready for it; nothing where it did not answer.
std::optional<Limits> ask(int device);
// The same, asked once and then known; and what of it calls may use.
Limits device_limits(int device);
Limits limits(int device);

// Which paths limits() has on a device from now on: bits by the number of a path, that of two passes always, and kOverlapBit.
constexpr int64_t kOverlapBit = 1 << 8;
void allow(int device, int64_t paths);
void tune(int device, int64_t cluster_bytes, double share_kept);
// Those that the current device has at all.
int64_t paths(int device);

// What a thread asks for in all of its calls, allowed or not: a path by its number and overlap, or -1.
struct Forced {
  int path = -1, overlap = -1;
};
Forced& forced();

// What plan.h says of these gradients and rules that keep `state_size` numbers.
Plan plan(const Grads& g, int state_size, const Limits& limits);
// Gramian, solve() and combine() in one launch, as a plan of another path than two_pass says; slots are plan.workspace doubles.
// False, and nothing is done, where the device cannot: the three then do it.
bool resolve_fused(const Grads& g, const SolveArgs& args, int64_t* rng, const Plan& plan, const Limits& limits, double* slots, void* out, Stream stream);

// Of linear branches what CpuKernels::heads writes; `head_of` [outputs] on the device names the branch of each output in ascending order, every branch
// of K, and is not checked; h.sizes is not looked at. `sums` holds rows * outputs numbers in accumulator precision for per = batch_sum.
struct HeadsPlan {
  int64_t warps;      // of the launch that folds, solves and scales, which wait for each other
  int64_t solvers;    // those of them that solve
  int64_t workspace;  // doubles
};
HeadsPlan plan_heads(const Heads& h, const SolveArgs& args, const Limits& limits);
void heads(const Heads& h, const int64_t* head_of, const SolveArgs& args, int64_t* rng, const HeadsPlan& plan, double* workspace, void* sums, void* left, void* right, Stream stream);

// workspace: n_leaks doubles on the device.
void graddrop(const Grads& g, const double* leaks, int n_leaks, double* workspace, int64_t* rng, void* out, Stream stream);
// `present` [K, K] is the result of presence().
void trimmed_mean(const Grads& g, const double* present, int trim, void* out, Stream stream);

}  // namespace gpu
}  // namespace mmfast
