// GradDrop and TrimmedMean: one write. GradDrop's operations are those of cpu/elementwise.h; TrimmedMean ranks where that one sorts, and adds in
// the order of the rows.
#define MMFAST_ISA cuda
#include "../solvers/philox.h"
#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// The uniforms of elements 64 * (index / 16) + index % 16, + 16, + 32, + 48: the four words of one Philox block (cpu/elementwise.h).
__device__ inline void uniforms(uint64_t seed, uint32_t counter, uint64_t index, float* u) {
  const Philox4 draw = philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, counter);
  for (int word = 0; word < 4; ++word) u[word] = (static_cast<float>(static_cast<int32_t>(draw.v[word] >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

template <class T>
__device__ inline Acc<T> graddrop_element(const Rows& rows, int64_t sample, int64_t t, Acc<T> u, double leak_of_all, const double* leaks) {
  using A = Acc<T>;
  const bool* mask = rows.mask ? rows.mask + sample * rows.mask_stride : nullptr;
  auto load = [&](int i, A* x) {
    if (mask && !mask[rows.row_index[i]]) return false;
    *x = load_acc(static_cast<const T*>(rows.ptr[i]) + t);
    return true;
  };
  A x, sum = 0, abs_sum = 0, kept_sum = 0;
  for (int i = 0; i < rows.k; ++i)
    if (load(i, &x)) sum += x, abs_sum += x > 0 ? x : A(0) - x;
  const A purity = A(0.5) * (A(1) + sum / abs_sum);
  const A positive = purity > u ? A(1) : A(0), negative = purity < u ? A(1) : A(0);  // what is let through without a leak
  for (int i = 0; i < rows.k; ++i)
    if (load(i, &x)) {
      const A share = x > 0 ? positive : negative, leak = static_cast<A>(leaks ? leaks[rows.row_index[i]] : leak_of_all);
      kept_sum += (share > leak ? share : leak) * x;
    }
  return kept_sum + A(0) * abs_sum;  // a non-finite element stays one
}

// By value: nothing is copied from the host, which a captured graph could not repeat.
struct Leaks {
  double of[kMaxRows];
};
__global__ void leaks_kernel(const __grid_constant__ Leaks leaks, int n, double* out) {
  if (static_cast<int>(threadIdx.x) < n) out[threadIdx.x] = leaks.of[threadIdx.x];
}

template <class T>
__global__ void graddrop_kernel(const __grid_constant__ Rows rows, int64_t n, int64_t inner, double leak, const double* leaks, const int64_t* rng, T* out) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  const uint32_t counter = static_cast<uint32_t>(rng[1]);
  const int64_t draws = (n + 63) / 64 * 16;
  for (int64_t p = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; p < draws; p += int64_t{gridDim.x} * blockDim.x) {
    float u[4];
    uniforms(seed, counter, static_cast<uint64_t>(p), u);
#pragma unroll  // so that u stays in registers
    for (int word = 0; word < 4; ++word) {
      const int64_t t = p / 16 * 64 + p % 16 + word * 16;
      if (t < n) store_acc(out + t, graddrop_element<T>(rows, t / inner, t, u[word], leak, leaks));
    }
  }
}

// The `trim` smallest and largest of the rows at t are left out: by rank, equal values in the order of their rows.
template <class T>
__device__ inline Acc<T> trimmed_element(const Rows& rows, const double* present, int K, int64_t sample, int64_t t, int trim) {
  using A = Acc<T>;
  const bool* mask = rows.mask ? rows.mask + sample * rows.mask_stride : nullptr;
  auto is_present = [&](int i) {
    const int row = rows.row_index[i];
    return present[row * int64_t{K + 1}] != 0.0 && (!mask || mask[row]);
  };
  auto load = [&](int i) { return load_acc(static_cast<const T*>(rows.ptr[i]) + t); };
  int k = 0;
  A zero = 0;  // or NaN where an element is not finite
  for (int i = 0; i < rows.k; ++i)
    if (is_present(i)) ++k, zero = fma_rn(A(0), load(i), zero);
  if (k == 0) return 0;
  const int max_cut = (k - 1) / 2, cut = trim < max_cut ? trim : max_cut;
  const A scale = A(1) / static_cast<A>(k - 2 * cut);
  A sum = zero;
  for (int i = 0; i < rows.k; ++i) {
    if (!is_present(i)) continue;
    const A x = load(i);
    int rank = 0;
    for (int j = 0; j < rows.k; ++j)
      if (j != i && is_present(j)) {
        const A y = load(j);
        rank += y < x || (y == x && j < i);
      }
    if (rank >= cut && rank < k - cut) sum += x;
  }
  return sum * scale;
}

template <class T>
__global__ void trimmed_kernel(const __grid_constant__ Rows rows, const double* present, int K, int64_t n, int64_t inner, int trim, T* out) {
  for (int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; t < n; t += int64_t{gridDim.x} * blockDim.x)
    store_acc(out + t, trimmed_element<T>(rows, present, K, t / inner, t, trim));
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

void graddrop(const Grads& g, const double* leaks, int n_leaks, double* workspace, int64_t* rng, void* out, Stream stream) {
  const int64_t n = g.batch * g.inner;
  if (n) {
    if (n_leaks > 1) {
      cuda::Leaks values{};
      for (int i = 0; i < n_leaks; ++i) values.of[i] = leaks[i];
      cuda::Launch(cuda::LaunchMode::plain, 1, kMaxRows, stream).start("leaks", cuda::leaks_kernel, values, n_leaks, workspace);
    }
    cuda::with_type(g.dtype, [&](auto tag) {
      using T = decltype(tag);
      cuda::Launch(cuda::LaunchMode::plain, cuda::blocks_for((n + 1023) / 1024), 256, stream)
          .start("graddrop", cuda::graddrop_kernel<T>, cuda::rows_of(g), n, g.inner, leaks[0], static_cast<const double*>(n_leaks > 1 ? workspace : nullptr), rng, static_cast<T*>(out));
    });
  }
  cuda::advance(rng, stream);
}

void trimmed_mean(const Grads& g, const double* present, int trim, void* out, Stream stream) {
  const int64_t n = g.batch * g.inner;
  if (n == 0) return;
  cuda::with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    cuda::Launch(cuda::LaunchMode::plain, cuda::blocks_for((n + 255) / 256), 256, stream)
        .start("trimmed_mean", cuda::trimmed_kernel<T>, cuda::rows_of(g), present, g.K, n, g.inner, trim, static_cast<T*>(out));
  });
}

}  // namespace gpu
}  // namespace mmfast
