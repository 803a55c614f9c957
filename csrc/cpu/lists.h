// Gradients of several tensors: one Gramian over all of them, a weighted sum for each. A pass shares out all tensors' elements at once, so that a small
// one costs no call and no meeting of the threads of its own.
#pragma once

#include <algorithm>
#include <vector>

#include "resolve.h"

namespace mmfast {
namespace MMFAST_ISA {

// The tensors' elements in units of `size`, one tensor after the other.
struct Units {
  std::vector<int64_t> starts;  // the first unit of each tensor, and the number of all
  Units(const GradLists& lists, int64_t size) : starts{0} {
    for (int64_t t = 0; t < lists.count; ++t) starts.push_back(starts.back() + (lists.tensors[t].inner + size - 1) / size);
  }
  int64_t all() const { return starts.back(); }
  // f(tensor, its first unit, its last) for what units [first, last) hold of each; from the end when `backwards`.
  template <bool backwards, class F>
  void each_tensor(int64_t first, int64_t last, const F& f) const {
    while (first < last) {
      const int64_t at = backwards ? last - 1 : first, t = std::upper_bound(starts.begin(), starts.end(), at) - starts.begin() - 1;
      const int64_t begin = std::max(first, starts[t]), end = std::min(last, starts[t + 1]);
      f(t, begin - starts[t], end - starts[t]);
      (backwards ? last : first) = backwards ? begin : end;
    }
  }
};

// Elements that a pass over all tensors reads.
inline int64_t elements(const GradLists& lists) {
  int64_t n = 0;
  for (int64_t t = 0; t < lists.count; ++t) n += lists.tensors[t].k * lists.tensors[t].inner;
  return n;
}

// Adds the Gramians of chunks [first, last) of a tensor to the pairs of K rows that slot_of names.
template <class T, class SlotOf>
inline void gram_of_tensor(const Grads& g, int64_t first, int64_t last, const SlotOf& slot_of) {
  const T* rows[kMaxRows];
  for (int i = 0; i < g.k; ++i) rows[i] = static_cast<const T*>(g.rows[i]);
  if (g.k == g.K) return gram_chunks<T>(rows, g.k, g.inner, first, last, false, slot_of);
  Arena arena;
  double* pairs = arena.take<double>(pair_count(g.k));
  for (; first < last; ++first) {
    for (int64_t e = 0; e < pair_count(g.k); ++e) pairs[e] = 0.0;
    gram_chunks<T>(rows, g.k, g.inner, first, first + 1, false, [&](int64_t) { return pairs; });
    double* slot = slot_of(first);
    for (int i = 0; i < g.k; ++i)
      for (int j = i; j < g.k; ++j) slot[pair_index(g.K, g.row_index[i], g.row_index[j])] += pairs[pair_index(g.k, i, j)];
  }
}

// G [K, K]
inline void gram_lists(const Pool& pool, const GradLists& lists, double* G) {
  const int K = lists.K;
  const Units units(lists, kChunk);
  Arena arena;
  double* pairs = arena.take<double>(pair_count(K));
  sum_units(
      pool, units.all(), elements(lists), pair_count(K),
      [&](int64_t first, int64_t last, bool, const auto& slot_of) {
        units.each_tensor<false>(first, last, [&](int64_t t, int64_t begin, int64_t end) {
          const auto slot = [&](int64_t chunk) { return slot_of(units.starts[t] + chunk); };
          with_type(lists.tensors[t].dtype, [&](auto tag) { gram_of_tensor<decltype(tag)>(lists.tensors[t], begin, end, slot); });
        });
      },
      pairs);
  int all[kMaxRows];
  for (int i = 0; i < K; ++i) all[i] = i;
  scatter_pairs(pairs, K, all, K, G);
}

// out[t] is the weighted sum of tensor t; from the last one to the first, for the Gramian has read the last ones last.
inline void combine_lists(const Pool& pool, const GradLists& lists, const double* w, void* const* out) {
  constexpr int64_t kPiece = 4096;
  const Units units(lists, kPiece);
  int64_t bytes = 0;
  for (int64_t t = 0; t < lists.count; ++t)
    with_type(lists.tensors[t].dtype, [&](auto tag) { bytes += lists.tensors[t].inner * static_cast<int64_t>(sizeof tag); });
  const bool stream = bytes >= kStreamBytes;
  auto range = [&](int64_t first, int64_t last) {
    units.each_tensor<true>(first, last, [&](int64_t t, int64_t begin, int64_t end) {
      const Grads& g = lists.tensors[t];
      with_type(g.dtype, [&](auto tag) {
        using T = decltype(tag);
        const ActiveRows<T> active(g, 0, 0, w, false);
        for (int64_t piece = end - 1; piece >= begin; --piece)
          combine_range<T>(active.rows, active.k, active.w, piece * kPiece, std::min(g.inner, (piece + 1) * kPiece), static_cast<T*>(out[t]), stream);
      });
    });
  };
  if (elements(lists) <= kSmallWork || pool.threads == 1) return range(0, units.all());
  parallel_for<true>(pool, units.all(), range);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
