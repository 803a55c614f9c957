// GradDrop and TrimmedMean: one write. GradDrop's operations are those of cpu/elementwise.h; TrimmedMean ranks where that one sorts, and adds in
// the order of the rows.
#define MMFAST_ISA cuda
#include "../solvers/philox.h"
#include "launch.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// The uniforms of elements 64 * group + place, + 16, + 32, + 48: the four words of one Philox block (cpu/elementwise.h).
__device__ inline void uniforms(uint64_t seed, uint32_t counter, uint64_t group, uint32_t place, float* u) {
  const uint64_t at = group * 16 + place;
  const Philox4 draw = philox(seed, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32), 0, counter);
  for (int word = 0; word < 4; ++word) u[word] = (static_cast<float>(static_cast<int32_t>(draw.v[word] >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

template <class T>
__device__ inline Acc<T> drop(const Rows& rows, int64_t sample, int64_t t, Acc<T> u, Acc<T> leak) {
  using A = Acc<T>;
  const bool* mask = rows.mask ? rows.mask + sample * rows.mask_stride : nullptr;
  auto value = [&](int i, A* x) {
    if (mask && !mask[rows.places[i]]) return false;
    *x = number(static_cast<const T*>(rows.at[i]) + t);
    return true;
  };
  A x, sum = 0, size = 0, keep = 0;
  for (int i = 0; i < rows.k; ++i)
    if (value(i, &x)) sum += x, size += x > 0 ? x : A(0) - x;
  const A purity = A(0.5) * (A(1) + sum / size);
  const A positive = purity > u ? A(1) : leak, negative = purity < u ? A(1) : leak;
  for (int i = 0; i < rows.k; ++i)
    if (value(i, &x)) keep += (x > 0 ? positive : negative) * x;
  return keep + A(0) * size;  // a non-finite element stays one
}

template <class T>
__global__ void graddrop_kernel(const __grid_constant__ Rows rows, int64_t n, int64_t inner, double leak, const int64_t* rng, T* out) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  const uint32_t counter = static_cast<uint32_t>(rng[1]);
  const int64_t places = (n + 63) / 64 * 16;
  for (int64_t p = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; p < places; p += int64_t{gridDim.x} * blockDim.x) {
    float u[4];
    uniforms(seed, counter, static_cast<uint64_t>(p / 16), static_cast<uint32_t>(p % 16), u);
    for (int word = 0; word < 4; ++word) {
      const int64_t t = p / 16 * 64 + p % 16 + word * 16;
      if (t < n) put(out + t, drop<T>(rows, t / inner, t, u[word], static_cast<Acc<T>>(leak)));
    }
  }
}

// The `trim` smallest and largest of the rows at t are left out: by rank, equal values in the order of their rows.
template <class T>
__device__ inline Acc<T> trimmed(const Rows& rows, const double* present, int K, int64_t sample, int64_t t, int trim) {
  using A = Acc<T>;
  const bool* mask = rows.mask ? rows.mask + sample * rows.mask_stride : nullptr;
  auto there = [&](int i) {
    const int place = rows.places[i];
    return present[place * int64_t{K + 1}] != 0.0 && (!mask || mask[place]);
  };
  auto value = [&](int i) { return number(static_cast<const T*>(rows.at[i]) + t); };
  int k = 0;
  A finite = 0;
  for (int i = 0; i < rows.k; ++i)
    if (there(i)) ++k, finite = fused(A(0), value(i), finite);
  if (k == 0) return 0;
  const int most = (k - 1) / 2, cut = trim < most ? trim : most;
  const A scale = A(1) / static_cast<A>(k - 2 * cut);
  A sum = finite;
  for (int i = 0; i < rows.k; ++i) {
    if (!there(i)) continue;
    const A x = value(i);
    int rank = 0;
    for (int j = 0; j < rows.k; ++j)
      if (j != i && there(j)) {
        const A y = value(j);
        rank += y < x || (y == x && j < i);
      }
    if (rank >= cut && rank < k - cut) sum += x;
  }
  return sum * scale;
}

template <class T>
__global__ void trimmed_kernel(const __grid_constant__ Rows rows, const double* present, int K, int64_t n, int64_t inner, int trim, T* out) {
  for (int64_t t = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; t < n; t += int64_t{gridDim.x} * blockDim.x)
    put(out + t, trimmed<T>(rows, present, K, t / inner, t, trim));
}

}  // namespace
}  // namespace MMFAST_ISA

namespace gpu {

void graddrop(const Grads& g, double leak, int64_t* rng, void* out, Stream stream) {
  const int64_t n = g.batch * g.inner;
  if (n)
    cuda::with_type(g.dtype, [&](auto zero) {
      using T = decltype(zero);
      cuda::graddrop_kernel<T><<<cuda::blocks_for((n + 1023) / 1024), 256, 0, cuda::raw(stream)>>>(cuda::rows_of(g), n, g.inner, leak, rng, static_cast<T*>(out));
      cuda::check_launch("graddrop");
    });
  cuda::advance(rng, stream);
}

void trimmed_mean(const Grads& g, const double* present, int trim, void* out, Stream stream) {
  const int64_t n = g.batch * g.inner;
  if (n == 0) return;
  cuda::with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::trimmed_kernel<T><<<cuda::blocks_for((n + 255) / 256), 256, 0, cuda::raw(stream)>>>(cuda::rows_of(g), present, g.K, n, g.inner, trim, static_cast<T*>(out));
    cuda::check_launch("trimmed_mean");
  });
}

}  // namespace gpu
}  // namespace mmfast
