// What Python asks of the CUDA code without a tensor (mmfast/backends/cuda.py). None of it throws, with or without a GPU.
#include "cuda/kernels.h"

#define MMFAST_EXPORT extern "C" __attribute__((visibility("default")))

using namespace mmfast;

// Why kernels of this library cannot run on the device, or null. The words last until the thread asks again.
MMFAST_EXPORT const char* mmfast_cuda_why_not(int64_t device) { return gpu::why_not(static_cast<int>(device)); }

// 0 where there is no code for the device, 1 for machine code, 2 for PTX that the driver has to compile first.
MMFAST_EXPORT int64_t mmfast_cuda_code(int64_t device) { return static_cast<int64_t>(gpu::code(static_cast<int>(device))); }

MMFAST_EXPORT const char* mmfast_cuda_architectures() { return gpu::architectures(); }

// For the calling thread: a path by its number, or -1; overlap 0 or 1, or -1 for what else decides.
MMFAST_EXPORT void mmfast_cuda_force(int64_t path, int64_t overlap) { gpu::forced() = {static_cast<int>(path), static_cast<int>(overlap)}; }

// Which paths the plan may choose from now on: bits by their numbers, bit 8 for overlap.
MMFAST_EXPORT void mmfast_cuda_allow(int64_t device, int64_t paths) { gpu::allow(static_cast<int>(device), paths); }

// Which of them the current device has, allowed or not; loads the kernels.
MMFAST_EXPORT int64_t mmfast_cuda_paths(int64_t device) { return gpu::paths(static_cast<int>(device)); }

// Up to how many bytes a problem goes to a cluster, and which share of it must be kept for one launch: about time alone, all paths have the same bits.
MMFAST_EXPORT void mmfast_cuda_tune(int64_t device, int64_t cluster_bytes, double share_kept) { gpu::tune(static_cast<int>(device), cluster_bytes, share_kept); }

// For mmfast.explain: {path, bytes read, bytes written, launches}; `per` is 0 for one problem, 1 for one per sample, 2 where neither has one launch.
MMFAST_EXPORT void mmfast_cuda_plan(int64_t device, int64_t size, int64_t k, int64_t K, int64_t batch, int64_t inner, int64_t state_size, int64_t per, int64_t* found) {
  Grads g{};
  g.dtype = size == 8 ? Dtype::f64 : size == 4 ? Dtype::f32 : Dtype::bf16;
  g.k = static_cast<int>(k), g.K = static_cast<int>(K);
  g.batch = batch, g.inner = inner, g.per = static_cast<Per>(per);
  const Plan plan = gpu::plan(g, static_cast<int>(state_size), gpu::limits(static_cast<int>(device)));
  found[0] = static_cast<int64_t>(plan.path), found[1] = plan.read, found[2] = plan.written, found[3] = plan.launches;
}
