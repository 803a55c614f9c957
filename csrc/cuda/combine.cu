// The second pass: sum_i w_i g_i. From the end to the start, for what the first pass read last is still in the L2 cache.
#define MMFAST_ISA cuda
#include "combine.h"

#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

template <class T>
__global__ void combine_kernel(const __grid_constant__ Rows rows, int64_t n, int64_t inner, bool samples, const double* w, int64_t w_stride, bool skip, T* out) {
  const int64_t all = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < n; e += all) {
    const int64_t t = n - 1 - e, sample = samples ? t / inner : 0;
    put(out + t, weighted<T>(rows, w + sample * w_stride, sample, t, skip));
  }
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

void combine(const Grads& g, const double* w, int64_t w_stride, bool skip, void* out, Stream stream) {
  const int64_t n = g.batch * g.inner;
  if (n == 0) return;
  const bool samples = g.per == Per::sample || g.mask_stride;
  cuda::with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::combine_kernel<T><<<cuda::blocks_for((n + 255) / 256), 256, 0, cuda::raw(stream)>>>(
        cuda::rows_of(g), n, g.inner, samples, w, g.per == Per::sample ? w_stride : 0, skip, static_cast<T*>(out));
    cuda::check_launch("combine");
  });
}

}  // namespace gpu
}  // namespace mmfast
