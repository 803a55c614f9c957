// Linear branches before their solver: what is left of delta under a mask, and the products of columns of delta and of W, in one launch.
#define MMFAST_ISA cuda
#include "heads.h"

#include <type_traits>

#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

template <class T>
__device__ void product_slots(const Columns& x, int64_t slot, int first, int second, double* shared, double* out) {
  product_square<T>(Block{}, x, slot, first, second, reinterpret_cast<Acc<T>*>(shared), out);
}

// Slots of `sent`, then those of `weight`; a block to each square of column pairs, on and right of the diagonal.
__global__ void __launch_bounds__(kThreads, 6) products_kernel(const __grid_constant__ Columns sent, int64_t sent_slots, const __grid_constant__ Columns weight, double* slots) {
  __shared__ double shared[square_shared<double>()];
  const int tiles = static_cast<int>(sent.tiles());
  int first = 0, rest = static_cast<int>(blockIdx.x);
  for (; rest >= tiles - first; ++first) rest -= tiles - first;
  for (int64_t s = blockIdx.y; s < sent_slots + weight.slots(); s += gridDim.y) {
    const bool is_weight = s >= sent_slots;
    const Columns& x = is_weight ? weight : sent;
    with_type(x.dtype, [&](auto zero) {
      product_slots<decltype(zero)>(x, is_weight ? s - sent_slots : s, first, first + rest, shared, slots + s * x.columns * x.columns);
    });
  }
}

template <class T, class P>
__global__ void send_kernel(const T* delta, const int64_t* head_of, int64_t count, int64_t outputs, int64_t sample, const bool* mask, int64_t mask_stride, P* left) {
  for (int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; e < count; e += int64_t{gridDim.x} * blockDim.x) {
    const bool there = !mask || mask[e / sample * mask_stride + head_of[e % outputs]];
    put(left + e, there ? number(delta + e) : Acc<T>(0));  // what a mask hides is not read, not even a NaN
  }
}

}  // namespace

void multiply(const Columns& sent, const Columns& weight, bool of_sent, double* slots, void* stream) {
  const int64_t sent_slots = of_sent ? sent.slots() : 0, all = sent_slots + weight.slots();
  const dim3 grid(static_cast<unsigned>(weight.squares()), static_cast<unsigned>(all < 65535 ? all : 65535));
  products_kernel<<<grid, kThreads, 0, raw(stream)>>>(sent, sent_slots, weight, slots);
  check_launch("products");
}

void send(const Heads& h, const int64_t* head_of, void* left, void* stream) {
  const int64_t count = h.batch * h.rows * h.outputs;
  if (count == 0) return;
  with_type(h.dtype, [&](auto zero) {
    using T = decltype(zero);
    using P = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    send_kernel<T, P><<<blocks_for((count + 255) / 256), 256, 0, raw(stream)>>>(static_cast<const T*>(h.delta), head_of, count, h.outputs, h.rows * h.outputs, h.mask, h.mask_stride,
                                                                              static_cast<P*>(left));
    check_launch("send");
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
