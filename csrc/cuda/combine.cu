// The second pass: sum_i w_i g_i. A segment from its end to its start, for what the first pass read last is still in the L2 cache.
#define MMFAST_ISA cuda
#include "combine.h"

#include "../solvers/norm.h"
#include "launch.h"
#include "norm.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kCombineThreads = 256, kElementsPerThread = 4;  // in flight
constexpr int kCombineTile = kCombineThreads * kElementsPerThread;
static_assert(kCombineThreads >= kMaxRows, "a thread decides on a row");

// A segment whose lengths were measured: its weights take their factor, and the sum is one in double precision. Few are.
template <class T>
__device__ __noinline__ void combine_measured(const Rows& rows, int64_t segment, int64_t size, const gpu::MeasuredNorm& norm, double* w, bool writes, T* out) {
  __shared__ const T* ptr[kMaxRows];
  __shared__ double weight[kMaxRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t problem = norm.w_stride ? segment : 0;
  const double *slots = norm.slots + problem * norm.slots_per_problem * 3, *raw = norm.raw + problem * norm.K;
  const double factor = measured_factor(static_cast<const Norm*>(norm.norm)[problem], sum_lengths(slots, norm.slots_per_problem, 0), sum_lengths(slots, norm.slots_per_problem, 2));
  const bool* mask = rows.mask ? rows.mask + segment * rows.mask_stride : nullptr;
  for (int i = thread; writes && i < norm.K; i += kCombineThreads) w[i] = raw[i] * factor;
  int count = 0, position = 0;
  for (int i = 0; i < rows.k; ++i) {
    const bool active = is_active(rows, i, raw, mask, true);
    position += i < thread && active, count += active;
  }
  if (thread < rows.k && is_active(rows, thread, raw, mask, true)) {
    ptr[position] = static_cast<const T*>(rows.ptr[thread]) + segment * size;
    weight[position] = raw[rows.row_index[thread]] * factor;
  }
  __syncthreads();
  for (int64_t e = blockIdx.x * int64_t{kCombineThreads} + thread; e < size; e += int64_t{gridDim.x} * kCombineThreads)
    weighted_sum_exact<T, 1>(ptr, weight, count, e, 0, out + segment * size);
}

// A segment has weights and mask of its own: a sample, or the whole gradient.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ Rows rows, int64_t segments, int64_t size, double* w, int64_t w_stride, bool skip,
                                                                       const __grid_constant__ gpu::MeasuredNorm norm, T* out) {
  __shared__ const T* ptr[kMaxRows];
  __shared__ Acc<T> weight[kMaxRows];
  __shared__ bool active[kMaxRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = (size + kCombineTile - 1) / kCombineTile;
  grid_dependency_wait();
  for (int64_t s = blockIdx.y; s < segments; s += gridDim.y) {
    double* segment_w = w + s * w_stride;
    __syncthreads();  // nobody still reads the lists of the segment before
    if (norm.norm && static_cast<const Norm*>(norm.norm)[w_stride ? s : 0].settled == 0.0) {
      combine_measured(rows, s, size, norm, segment_w, blockIdx.x == 0 && (w_stride || s == 0), out);
      continue;
    }
    if (thread < rows.k) active[thread] = is_active(rows, thread, segment_w, rows.mask ? rows.mask + s * rows.mask_stride : nullptr, skip);
    __syncthreads();
    int count = 0, position = 0;
    for (int i = 0; i < rows.k; ++i) count += active[i], position += i < thread && active[i];
    if (thread < rows.k && active[thread]) {
      ptr[position] = static_cast<const T*>(rows.ptr[thread]) + s * size;
      weight[position] = static_cast<Acc<T>>(segment_w[rows.row_index[thread]]);
    }
    __syncthreads();
    for (int64_t tile = tiles - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
      const int64_t t = tile * kCombineTile + thread;
      T* segment_out = out + s * size;
      Acc<T> sum[kElementsPerThread];
      if ((tile + 1) * kCombineTile <= size) {
        weighted_sum<T, kElementsPerThread>(ptr, weight, count, t, kCombineThreads, sum);
#pragma unroll
        for (int e = 0; e < kElementsPerThread; ++e) store_acc(segment_out + t + e * kCombineThreads, sum[e]);
      } else {
        for (int64_t e = t; e < size; e += kCombineThreads) {
          weighted_sum<T, 1>(ptr, weight, count, e, kCombineThreads, sum);
          store_acc(segment_out + e, sum[0]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

void combine(const Grads& g, double* w, int64_t w_stride, bool skip, const MeasuredNorm& norm, void* out, bool overlap, Stream stream) {
  if (g.batch * g.inner == 0) return;
  const bool samples = g.per == Per::sample || g.mask_stride;
  const int64_t segments = samples ? g.batch : 1, size = samples ? g.inner : g.batch * g.inner;
  const int64_t tiles = (size + cuda::kCombineTile - 1) / cuda::kCombineTile;
  cuda::with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    const dim3 grid(cuda::blocks_for(tiles), static_cast<unsigned>(segments < 65535 ? segments : 65535));
    cuda::Launch(cuda::dependent_if(overlap), grid, cuda::kCombineThreads, stream)
        .start("combine", cuda::combine_kernel<T>, cuda::rows_of(g), segments, size, w, g.per == Per::sample ? w_stride : 0, skip, norm, static_cast<T*>(out));
  });
}

}  // namespace gpu
}  // namespace mmfast
