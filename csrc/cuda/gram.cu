// The first pass: partial Gramians of slots, then the slots of each problem in order (gram.h).
#define MMFAST_ISA cuda
#include "launch.h"
#include "tiles.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

template <class T, int R, int C>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Units units, double* slots) {
  __shared__ Acc<T> shared[reduce_shared_size<T>()];
  grid_dependency_launch();
  // blocks start in the order of x: the tiles of one slot run together, and find its rows in the L2 cache
  const TileOrigin tile = tile_origin<R, C>(rows.k, static_cast<int>(blockIdx.x));
  for (int64_t s = blockIdx.y; s < units.slots(); s += gridDim.y)
    gram_slot<T, R, C>(Block{}, rows, units, s, tile.row, tile.column, shared, slots + s * pair_count(rows.k));
}

// Which gradient is a row of K; -1 for none.
struct GradientOfRow {
  int16_t index[kMaxRows];
};

__global__ void fold_kernel(const double* slots, int64_t per_problem, int k, int K, const __grid_constant__ GradientOfRow gradient, const bool* mask, int64_t mask_stride,
                            int64_t problems, double* G, int64_t stride) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t size = static_cast<int64_t>(K) * K;
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < problems * size; e += int64_t{gridDim.x} * blockDim.x) {
    const int64_t b = e / size, pairs = pair_count(k);
    const int i = static_cast<int>(e % size / K), j = static_cast<int>(e % K);
    const bool hidden = mask && !(mask[b * mask_stride + i] && mask[b * mask_stride + j]);
    G[b * stride + e % size] = fold_slots(slots + b * per_problem * pairs, per_problem, pairs, k, gradient.index[i], gradient.index[j], hidden);
  }
}

template <class T>
__global__ void sums_kernel(const __grid_constant__ Rows rows, int64_t batch, int64_t inner, Acc<T>* sums) {
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < rows.k * inner; e += int64_t{gridDim.x} * blockDim.x) {
    const int i = static_cast<int>(e / inner);
    const T* row = static_cast<const T*>(rows.ptr[i]) + e % inner;
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      if (!rows.mask || rows.mask[b * rows.mask_stride + rows.row_index[i]]) sum += static_cast<double>(load_acc(row + b * inner));
    sums[e] = static_cast<Acc<T>>(sum);
  }
}

// Threads that find a non-zero element all write the same 1, and the others of the row stop when they see it.
template <class T>
__global__ void presence_kernel(const __grid_constant__ Rows rows, int K, int64_t batch, int64_t inner, bool samples, double* G, int64_t stride) {
  const int i = static_cast<int>(blockIdx.y);
  const T* row = static_cast<const T*>(rows.ptr[i]);
  for (int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; t < batch * inner; t += int64_t{gridDim.x} * blockDim.x) {
    const int64_t b = t / inner;
    if (rows.mask && !rows.mask[b * rows.mask_stride + rows.row_index[i]]) continue;
    volatile double* found = G + (samples ? b : 0) * stride + rows.row_index[i] * int64_t{K + 1};
    if (*found != 0.0) {
      if (samples) continue;
      return;
    }
    if (!(load_acc(row + t) == 0)) *found = 1.0;
  }
}

template <class T>
void launch_gram(const Rows& rows, const Units& units, double* slots, gpu::Stream stream) {
  for_tile_shapes(rows.k, [&](auto r, auto c, int tiles) {
    Launch(LaunchMode::plain, dim3(tiles, blocks_for(units.slots())), kThreads, stream)
        .start("gram", gram_kernel<T, decltype(r)::value, decltype(c)::value>, rows, units, slots);
  });
}

Units units_of(const Grads& g) {
  if (g.per == Per::sample || g.mask_stride) return sample_units(g.batch, g.inner, g.per == Per::sample);
  return whole_units(g.batch * g.inner);
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

SlotPlan plan_slots(const Grads& g) {
  const int64_t slots = cuda::units_of(g).slots();
  return {slots, g.per == Per::sample ? 1 : slots, slots * pair_count(g.k)};
}

void batch_sums(const Grads& g, void* sums, Stream stream) {
  cuda::with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    cuda::Launch(cuda::LaunchMode::plain, cuda::blocks_for((g.k * g.inner + 255) / 256), 256, stream)
        .start("batch_sums", cuda::sums_kernel<T>, cuda::rows_of(g), g.batch, g.inner, static_cast<cuda::Acc<T>*>(sums));
  });
}

void gram(const Grads& g, double* workspace, double* G, int64_t G_stride, bool overlap, Stream stream) {
  const SlotPlan plan = plan_slots(g);
  const int64_t problems = g.per == Per::sample ? g.batch : 1;
  if (plan.slots)
    cuda::with_type(g.dtype, [&](auto tag) { cuda::launch_gram<decltype(tag)>(cuda::rows_of(g), cuda::units_of(g), workspace, stream); });
  cuda::GradientOfRow gradient;
  for (int row = 0; row < g.K; ++row) gradient.index[row] = -1;
  for (int i = 0; i < g.k; ++i) gradient.index[g.row_index[i]] = static_cast<int16_t>(i);
  const int64_t entries = problems * g.K * g.K;
  if (entries == 0) return;
  const bool* mask = g.per == Per::sample || g.mask_stride == 0 ? g.mask : nullptr;  // those that hide a row from its whole problem
  cuda::Launch(cuda::dependent_if(overlap && plan.slots), cuda::blocks_for((entries + 127) / 128), 128, stream)
      .start("fold", cuda::fold_kernel, workspace, plan.per_problem, g.k, g.K, gradient, mask, g.mask_stride, problems, G, G_stride);
}

void presence(const Grads& g, double* G, int64_t G_stride, Stream stream) {
  const int64_t problems = g.per == Per::sample ? g.batch : 1, n = g.batch * g.inner;
  const size_t width = sizeof(double) * g.K * g.K;
  cuda::check_launch(cudaMemset2DAsync(G, sizeof(double) * G_stride, 0, width, problems, cuda::cuda_stream(stream)), "memset");
  if (n == 0) return;
  cuda::with_type(g.dtype, [&](auto tag) {
    cuda::Launch(cuda::LaunchMode::plain, dim3(cuda::blocks_for((n + 1023) / 1024), g.k), 256, stream)
        .start("presence", cuda::presence_kernel<decltype(tag)>, cuda::rows_of(g), g.K, g.batch, g.inner, g.per == Per::sample, G, G_stride);
  });
}

}  // namespace gpu
}  // namespace mmfast
