// sum_i w_i g_i: single precision (double for double), rows in order, one rounding at the end for 16-bit types.
#pragma once

#include "arena.h"
#include "pool.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kCombineRows = 8;        // rows read side by side
constexpr int64_t kCombineBlock = 1024;  // elements whose sum stays in the first-level cache meanwhile
// Outputs beyond this many bytes go past the caches: they could not stay there until they are read anyway.
constexpr int64_t kStreamBytes = 16 << 20;

// out[begin, end) (+)= sum of k <= kCombineRows rows; with `accumulate` acc holds the sums of the rows before.
template <class T, int k, bool accumulate, bool stream>
inline void combine_rows(const T* const* rows, const Acc<T>* w, int64_t begin, int64_t end, Acc<T>* acc) {
  using V = Vec<T>;
  const T* p[k];
  typename V::Reg weight[k];
  for (int i = 0; i < k; ++i) p[i] = rows[i], weight[i] = V::set(w[i]);
  int64_t t = begin;
  for (; t + V::width <= end; t += V::width) {
    typename V::Reg sum;
    if constexpr (accumulate)
      sum = V::fma(weight[0], V::load(p[0] + t), V::load(acc + t - begin));
    else
      sum = V::mul(weight[0], V::load(p[0] + t));
#pragma GCC unroll 8
    for (int i = 1; i < k; ++i) sum = V::fma(weight[i], V::load(p[i] + t), sum);
    if constexpr (stream)
      V::stream(acc + t - begin, sum);
    else
      V::store(acc + t - begin, sum);
  }
  for (; t < end; ++t) {
    Acc<T> sum = accumulate ? acc[t - begin] : 0;
    for (int i = 0; i < k; ++i) {
      const Acc<T> x = load_acc(p[i] + t);
      sum = !accumulate && i == 0 ? w[0] * x : std::fma(w[i], x, sum);
    }
    acc[t - begin] = sum;
  }
}

// The same for any k <= kCombineRows.
template <class T, bool accumulate, bool stream = false>
inline void combine_few(const T* const* rows, int k, const Acc<T>* w, int64_t begin, int64_t end, Acc<T>* acc) {
  switch (k) {
    case 1: return combine_rows<T, 1, accumulate, stream>(rows, w, begin, end, acc);
    case 2: return combine_rows<T, 2, accumulate, stream>(rows, w, begin, end, acc);
    case 3: return combine_rows<T, 3, accumulate, stream>(rows, w, begin, end, acc);
    case 4: return combine_rows<T, 4, accumulate, stream>(rows, w, begin, end, acc);
    case 5: return combine_rows<T, 5, accumulate, stream>(rows, w, begin, end, acc);
    case 6: return combine_rows<T, 6, accumulate, stream>(rows, w, begin, end, acc);
    case 7: return combine_rows<T, 7, accumulate, stream>(rows, w, begin, end, acc);
    case 8: return combine_rows<T, 8, accumulate, stream>(rows, w, begin, end, acc);
  }
}

// Elements [begin, end) of the sum.
template <class T>
inline void combine_range(const T* const* rows, int k, const Acc<T>* w, int64_t begin, int64_t end, T* out, bool stream) {
  using A = Acc<T>;
  if (begin >= end) return;
  if (k == 0) {
    std::memset(static_cast<void*>(out + begin), 0, sizeof(T) * static_cast<size_t>(end - begin));
    return;
  }
  if constexpr (std::is_same_v<T, A>) {
    if (k <= kCombineRows) {
      if (!stream) return combine_few<T, false>(rows, k, w, begin, end, out + begin);
      while (begin < end && reinterpret_cast<uintptr_t>(out + begin) % 64) {
        combine_few<T, false>(rows, k, w, begin, begin + 1, out + begin);
        ++begin;
      }
      combine_few<T, false, true>(rows, k, w, begin, end, out + begin);
#if defined(__AVX2__)
      _mm_sfence();
#endif
      return;
    }
  }
  alignas(64) A sum[kCombineBlock];
  for (int64_t b = begin; b < end; b += kCombineBlock) {
    const int64_t stop = end - b < kCombineBlock ? end : b + kCombineBlock;
    A* acc = sum;
    if constexpr (std::is_same_v<T, A>) acc = out + b;
    combine_few<T, false>(rows, k < kCombineRows ? k : kCombineRows, w, b, stop, acc);
    for (int i = kCombineRows; i < k; i += kCombineRows)
      combine_few<T, true>(rows + i, k - i < kCombineRows ? k - i : kCombineRows, w + i, b, stop, acc);
    if constexpr (!std::is_same_v<T, A>)
      store_row(sum, stop - b, out + b);
  }
}

// Whole vectors over the pool, each thread from its end to its start: what a sweep before read last is still in the caches.
template <class T>
inline void combine_parallel(const Pool& pool, const T* const* rows, int k, const Acc<T>* w, int64_t n, T* out) {
  const bool stream = n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  if (n * k <= kSmallWork || pool.threads == 1) return combine_range<T>(rows, k, w, 0, n, out, stream);
  constexpr int64_t kPiece = 4096;
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t piece = end - 1; piece >= begin; --piece)
      combine_range<T>(rows, k, w, piece * kPiece, (piece + 1) * kPiece < n ? (piece + 1) * kPiece : n, out, stream);
  };
  parallel_for<true>(pool, (n + kPiece - 1) / kPiece, range);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
