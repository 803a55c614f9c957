// Between the two passes: the lengths of those problems whose Gramian does not know them. Others cost a look at one number.
#define MMFAST_ISA cuda
#include "norm.h"

#include "../solvers/norm.h"
#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// Slots [problems, slots, 3] of the squared lengths; of all problems where norm is null. Problems are samples of `inner` elements.
template <class T>
__global__ void __launch_bounds__(kThreads) lengths_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Units units, int64_t problems, int64_t batch, int64_t inner,
                                                           const Norm* norm, const double* w, int64_t w_stride, double* slots) {
  __shared__ double shared[kLengthsShared];
  grid_dependency_launch();
  grid_dependency_wait();
  for (int64_t problem = blockIdx.y; problem < problems; problem += gridDim.y) {
    if (norm && norm[problem].settled != 0.0) continue;
    Sums<T, Rows> sums{rows, w + problem * w_stride, batch, inner, problem, nullptr, 0};
    for (int64_t s = blockIdx.x; s < units.slots(); s += gridDim.x) lengths_slot(Block{}, sums, units, s, shared, slots + (problem * units.slots() + s) * 3);
  }
}

// total [problems, 3] from their slots in order.
__global__ void fold_lengths_kernel(const double* slots, int64_t count, int64_t problems, double* total) {
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < problems * 3; e += int64_t{gridDim.x} * blockDim.x)
    total[e] = sum_lengths(slots + e / 3 * count * 3, count, static_cast<int>(e % 3));
}

Units units_of_lengths(const Grads& g) {
  if (g.per == Per::batch && g.mask_stride) return sample_units(g.batch, g.inner, false);
  return whole_units(g.per == Per::batch ? g.batch * g.inner : g.inner);
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

int64_t lengths_slots(const Grads& g) { return cuda::units_of_lengths(g).slots(); }

void lengths(const Grads& g, const double* norm, const double* w, int64_t w_stride, double* slots, bool overlap, Stream stream) {
  const cuda::Units units = cuda::units_of_lengths(g);
  const int64_t problems = g.per == Per::sample ? g.batch : 1;
  if (units.slots() == 0 || problems == 0) return;
  const dim3 grid(cuda::blocks_for(units.slots()), static_cast<unsigned>(problems < 65535 ? problems : 65535));
  cuda::with_type(g.dtype, [&](auto tag) {
    cuda::Launch(cuda::dependent_if(overlap), grid, cuda::kThreads, stream)
        .start("lengths", cuda::lengths_kernel<decltype(tag)>, cuda::rows_of(g), units, problems, g.per == Per::batch_sum ? g.batch : 0, g.inner,
               reinterpret_cast<const cuda::Norm*>(norm), w, w_stride, slots);
  });
}

void fold_lengths(const double* slots, int64_t count, int64_t problems, double* total, Stream stream) {
  if (problems == 0) return;
  cuda::Launch(cuda::LaunchMode::plain, cuda::blocks_for((problems * 3 + 127) / 128), 128, stream)
      .start("fold_lengths", cuda::fold_lengths_kernel, slots, count, problems, total);
}

}  // namespace gpu
}  // namespace mmfast
