// gram, combine and resolve over whole gradients, samples, or batch sums; with missing rows and per-sample masks.
#pragma once

#include "combine.h"
#include "gram.h"
#include "norm.h"

namespace mmfast {
namespace MMFAST_ISA {

// G [K, K] of the whole batch.
template <class T>
inline void gram_batch(const Pool& pool, const Grads& g, double* G) {
  using A = Acc<T>;
  Arena arena;
  double* pairs = arena.take<double>(pair_count(g.k));
  if (g.per == Per::batch_sum) {
    A* sums = arena.take<A>(g.k * g.inner);
    batch_sums<T>(pool, g, sums);
    const A* rows[kMaxRows];
    for (int i = 0; i < g.k; ++i) rows[i] = sums + i * g.inner;
    gram_rows(pool, rows, g.k, g.inner, pairs);
    scatter_pairs(pairs, g.k, g.row_index, g.K, G);
  } else if (g.mask && g.mask_stride) {
    // a missing sample of a row counts as zero: the masked sum of the samples' Gramians
    sum_units(
        pool, g.batch, g.batch * g.inner * g.k, pair_count(g.k),
        [&](int64_t first, int64_t last, bool, const auto& slot_of) {
          for (int64_t b = first; b < last; ++b) {
            double* slot = slot_of(b);
            Arena scratch;
            int index[kMaxRows], n = 0;
            const T* rows[kMaxRows];
            for (int i = 0; i < g.k; ++i)
              if (!is_masked(g, b, i)) {
                rows[n] = static_cast<const T*>(g.rows[i]) + b * g.inner;
                index[n++] = i;
              }
            double* sample_pairs = scratch.take<double>(pair_count(n));
            gram_rows(kSerial, rows, n, g.inner, sample_pairs);
            for (int i = 0; i < n; ++i)
              for (int j = i; j < n; ++j) slot[pair_index(g.k, index[i], index[j])] += sample_pairs[pair_index(n, i, j)];
          }
        },
        pairs);
    scatter_pairs(pairs, g.k, g.row_index, g.K, G);
  } else {
    const PresentRows<T> present(g, 0, 0);
    gram_rows(pool, present.rows, present.k, g.batch * g.inner, pairs);
    scatter_pairs(pairs, present.k, present.row_index, g.K, G);
  }
}

template <class T>
inline void gram_sample(const Grads& g, int64_t b, double* G) {
  Arena arena;
  const PresentRows<T> present(g, b, b * g.inner);
  double* pairs = arena.take<double>(pair_count(present.k));
  gram_rows(kSerial, present.rows, present.k, g.inner, pairs);
  scatter_pairs(pairs, present.k, present.row_index, g.K, G);
}

// Diagonal only: 1 where a row has a non-zero (or NaN) element among those the mask leaves in.
template <class T>
inline void presence(const Grads& g, int64_t first, int64_t last, double* G) {
  for (int64_t e = 0; e < static_cast<int64_t>(g.K) * g.K; ++e) G[e] = 0.0;
  for (int i = 0; i < g.k; ++i) {
    bool found = false;
    for (int64_t b = first; b < last && !found; ++b) {
      if (is_masked(g, b, i)) continue;
      const T* row = static_cast<const T*>(g.rows[i]) + b * g.inner;
      for (int64_t t = 0; t < g.inner && !found; ++t) found = !(load_acc(row + t) == 0);
    }
    G[static_cast<int64_t>(g.row_index[i]) * (g.K + 1)] = found ? 1.0 : 0.0;
  }
}

// The rows of a sample that take part in its sum, and their weights: those of weight zero are not read when `skip`, for then they are known to be
// finite or missing.
template <class T>
struct ActiveRows {
  const T* rows[kMaxRows];
  Acc<T> w[kMaxRows];
  int k = 0;
  ActiveRows(const Grads& g, int64_t sample, int64_t offset, const double* weights, bool skip) {
    for (int i = 0; i < g.k; ++i) {
      const double weight = weights[g.row_index[i]];
      if (is_masked(g, sample, i) || (skip && weight == 0.0)) continue;
      rows[k] = static_cast<const T*>(g.rows[i]) + offset;
      w[k++] = static_cast<Acc<T>>(weight);
    }
  }
};

// One weight per row; samples apart only where the mask tells them apart.
template <class T>
inline void combine_batch(const Pool& pool, const Grads& g, const double* w, bool skip, T* out) {
  if (!g.mask || !g.mask_stride) {
    const ActiveRows<T> active(g, 0, 0, w, skip);
    return combine_parallel<T>(pool, active.rows, active.k, active.w, g.batch * g.inner, out);
  }
  parallel_for(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const ActiveRows<T> active(g, b, b * g.inner, w, skip);
      combine_range<T>(active.rows, active.k, active.w, 0, g.inner, out + b * g.inner, false);
    }
  });
}

// The same in double precision.
template <class T>
inline void combine_batch_exact(const Pool& pool, const Grads& g, const double* w, T* out) {
  if (!g.mask || !g.mask_stride) return combine_exact(pool, WeightedRows<T>(g, 0, 0, w), g.batch * g.inner, out);
  for (int64_t b = 0; b < g.batch; ++b) combine_exact(pool, WeightedRows<T>(g, b, b * g.inner, w), g.inner, out + b * g.inner);
}

// Squared lengths (plain sum, their product, weighted sum) of each problem, [3] or [batch, 3].
inline void lengths(const Pool& pool, const Grads& g, const double* w, double* total) {
  with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (g.per != Per::sample) return lengths_batch<T>(pool, g, w, total);
    parallel_for(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) lengths_sample<T>(g, b, w + b * g.K, total + 3 * b);
    });
  });
}

inline void gram(const Pool& pool, const Grads& g, double* G) {
  with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (g.per != Per::sample) return gram_batch<T>(pool, g, G);
    parallel_for(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) gram_sample<T>(g, b, G + b * g.K * g.K);
    });
  });
}

inline void combine(const Pool& pool, const Grads& g, const double* w, void* out) {
  with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (g.per != Per::sample) return combine_batch<T>(pool, g, w, false, static_cast<T*>(out));
    parallel_for(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const ActiveRows<T> active(g, b, b * g.inner, w + b * g.K, false);
        combine_range<T>(active.rows, active.k, active.w, 0, g.inner, static_cast<T*>(out) + b * g.inner, false);
      }
    });
  });
}

inline void resolve(const Pool& pool, const Grads& g, const SolveArgs& args, bool with_gram, void* out) {
  with_gram = with_gram || g.per == Per::batch_sum;  // there a row is missing when its batch sum is zero
  with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (g.per != Per::sample) {
      double* G = const_cast<double*>(args.G);
      with_gram ? gram_batch<T>(pool, g, G) : presence<T>(g, 0, g.batch, G);
      Norm norm;
      solve_range(args, 0, 1, &norm);
      const bool measured = args.preserve_norm && keep_norm(g.K, norm, [&](double* total) { lengths_batch<T>(pool, g, args.w, total); }, args.w);
      return measured ? combine_batch_exact<T>(pool, g, args.w, static_cast<T*>(out)) : combine_batch<T>(pool, g, args.w, with_gram, static_cast<T*>(out));
    }
    // one sample at a time: its rows are still in the first cache when they are combined
    parallel_for(pool, g.batch, g.batch * (g.inner * g.k + 64), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double* G = const_cast<double*>(args.G) + b * args.G_stride;
        with_gram ? gram_sample<T>(g, b, G) : presence<T>(g, b, b + 1, G);
        double* w = args.w + b * args.w_stride;
        Norm norm;
        solve_range(args, b, b + 1, &norm);
        if (args.preserve_norm && keep_norm(g.K, norm, [&](double* total) { lengths_sample<T>(g, b, w, total); }, w)) {
          combine_exact(kSerial, WeightedRows<T>(g, b, b * g.inner, w), g.inner, static_cast<T*>(out) + b * g.inner);
          continue;
        }
        const ActiveRows<T> active(g, b, b * g.inner, w, with_gram);
        combine_range<T>(active.rows, active.k, active.w, 0, g.inner, static_cast<T*>(out) + b * g.inner, false);
      }
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
