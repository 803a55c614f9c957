// Linear branches before their solver: what is left of delta under a mask, and the products of columns of delta and of W, in one launch.
#define MMFAST_ISA cuda
#include "heads.h"

#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

template <class T>
__device__ void product_slot(const MatrixView& x, int64_t slot, int first, int second, double* shared, double* out) {
  product_tile<T>(Block{}, x, slot, first, second, reinterpret_cast<Acc<T>*>(shared), out);
}

// Slots of `delta`, then those of `weight`; a block to each pair of tiles, on and right of the diagonal.
__global__ void __launch_bounds__(kThreads, 6) products_kernel(const __grid_constant__ MatrixView delta, int64_t delta_slots, const __grid_constant__ MatrixView weight,
                                                              double* slots) {
  __shared__ double shared[product_shared_size<double>()];
  const int tiles = static_cast<int>(delta.tiles());
  int first = 0, rest = static_cast<int>(blockIdx.x);
  for (; rest >= tiles - first; ++first) rest -= tiles - first;
  for (int64_t s = blockIdx.y; s < delta_slots + weight.slots(); s += gridDim.y) {
    const bool is_weight = s >= delta_slots;
    const MatrixView& x = is_weight ? weight : delta;
    with_type(x.dtype, [&](auto tag) {
      product_slot<decltype(tag)>(x, is_weight ? s - delta_slots : s, first, first + rest, shared, slots + s * x.columns * x.columns);
    });
  }
}

template <class T>
__global__ void mask_delta_kernel(const T* delta, const int64_t* head_of, int64_t count, int64_t outputs, int64_t sample, const bool* mask, int64_t mask_stride, Factor<T>* left) {
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < count; e += int64_t{gridDim.x} * blockDim.x) {
    const bool present = !mask || mask[e / sample * mask_stride + head_of[e % outputs]];
    store_acc(left + e, present ? load_acc(delta + e) : Acc<T>(0));  // what a mask hides is not read, not even a NaN
  }
}

}  // namespace

void multiply_columns(const MatrixView& delta, const MatrixView& weight, bool with_delta, double* slots, void* stream) {
  const int64_t delta_slots = with_delta ? delta.slots() : 0, all = delta_slots + weight.slots();
  const dim3 grid(static_cast<unsigned>(weight.tile_pairs()), static_cast<unsigned>(all < 65535 ? all : 65535));
  Launch(LaunchMode::plain, grid, kThreads, stream).start("products", products_kernel, delta, delta_slots, weight, slots);
}

void mask_delta(const Heads& h, const int64_t* head_of, void* left, void* stream) {
  const int64_t count = h.batch * h.rows * h.outputs;
  if (count == 0) return;
  with_type(h.dtype, [&](auto tag) {
    using T = decltype(tag);
    Launch(LaunchMode::plain, blocks_for((count + 255) / 256), 256, stream)
        .start("mask_delta", mask_delta_kernel<T>, static_cast<const T*>(h.delta), head_of, count, h.outputs, h.rows * h.outputs, h.mask, h.mask_stride,
               static_cast<Factor<T>*>(left));
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
