// The second pass: sum_i w_i g_i. A segment from its end to its start, for what the first pass read last is still in the L2 cache.
#define MMFAST_ISA cuda
#include "combine.h"

#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kWide = 256, kEach = 4;  // threads of a block, and elements that each has in flight
static_assert(kWide >= kMaxRows, "a thread decides on a row");

// A segment has weights and mask of its own: a sample, or the whole gradient.
template <class T>
__global__ void __launch_bounds__(kWide) combine_kernel(const __grid_constant__ Rows rows, int64_t segments, int64_t size, const double* w, int64_t w_stride, bool skip, T* out) {
  __shared__ const T* at[kMaxRows];
  __shared__ Acc<T> weight[kMaxRows];
  __shared__ bool keep[kMaxRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = (size + kWide * kEach - 1) / (kWide * kEach);
  wait_for_previous();
  for (int64_t s = blockIdx.y; s < segments; s += gridDim.y) {
    const double* own = w + s * w_stride;
    __syncthreads();  // nobody still reads the lists of the segment before
    if (thread < rows.k) keep[thread] = enters(rows, thread, own, rows.mask ? rows.mask + s * rows.mask_stride : nullptr, skip);
    __syncthreads();
    int count = 0, before = 0;
    for (int i = 0; i < rows.k; ++i) count += keep[i], before += i < thread && keep[i];
    if (thread < rows.k && keep[thread]) {
      at[before] = static_cast<const T*>(rows.at[thread]) + s * size;
      weight[before] = static_cast<Acc<T>>(own[rows.places[thread]]);
    }
    __syncthreads();
    for (int64_t tile = tiles - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
      const int64_t t = tile * (kWide * kEach) + thread;
      T* to = out + s * size;
      Acc<T> sum[kEach];
      if ((tile + 1) * (kWide * kEach) <= size) {
        weighted<T, kEach>(at, weight, count, t, kWide, sum);
#pragma unroll
        for (int e = 0; e < kEach; ++e) put(to + t + e * kWide, sum[e]);
      } else {
        for (int64_t e = t; e < size; e += kWide) {
          weighted<T, 1>(at, weight, count, e, kWide, sum);
          put(to + e, sum[0]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

void combine(const Grads& g, const double* w, int64_t w_stride, bool skip, void* out, bool overlap, Stream stream) {
  if (g.batch * g.inner == 0) return;
  const bool apart = g.per == Per::sample || g.mask_stride;
  const int64_t segments = apart ? g.batch : 1, size = apart ? g.inner : g.batch * g.inner;
  const int64_t tiles = (size + cuda::kWide * cuda::kEach - 1) / (cuda::kWide * cuda::kEach);
  cuda::with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(cuda::blocks_for(tiles), static_cast<unsigned>(segments < 65535 ? segments : 65535));
    cuda::start(cuda::soon(overlap), grid, cuda::kWide, cuda::raw(stream), cuda::combine_kernel<T>, cuda::rows_of(g), segments, size, w,
                g.per == Per::sample ? w_stride : 0, skip, static_cast<T*>(out));
    cuda::check_launch("combine");
  });
}

}  // namespace gpu
}  // namespace mmfast
