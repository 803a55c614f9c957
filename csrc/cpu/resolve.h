// gram, combine and resolve over whole gradients, samples, or batch sums; with missing rows and per-sample masks.
#pragma once

#include "combine.h"
#include "gram.h"
#include "solve_batch.h"

namespace mmfast {
namespace MMFAST_ISA {

template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f16: return f(Half{});
    case Dtype::bf16: return f(Bfloat{});
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
  }
}

// The rows of sample b that its mask leaves in (all samples share the mask when mask_stride is 0).
template <class T>
struct Present {
  const T* rows[kMaxRows];
  int places[kMaxRows];
  int k = 0;
  Present(const Grads& g, int64_t b, int64_t offset) {
    const bool* mask = g.mask ? g.mask + b * g.mask_stride : nullptr;
    for (int i = 0; i < g.k; ++i)
      if (!mask || mask[g.places[i]]) {
        rows[k] = static_cast<const T*>(g.rows[i]) + offset;
        places[k++] = g.places[i];
      }
  }
};

// Sums over the batch, rows [k, inner] in accumulator precision; double inside, so that a large batch loses nothing.
template <class T>
inline void batch_sums(const Pool& pool, const Grads& g, typename Stored<T>::Vec::Acc* sums) {
  using Acc = typename Stored<T>::Vec::Acc;
  constexpr int64_t kBlock = 512;
  const int64_t blocks = (g.inner + kBlock - 1) / kBlock;
  run(pool, g.k * blocks, g.k * g.batch * g.inner, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int i = static_cast<int>(item / blocks);
      const int64_t from = item % blocks * kBlock, count = g.inner - from < kBlock ? g.inner - from : kBlock;
      const T* row = static_cast<const T*>(g.rows[i]) + from;
      double sum[kBlock] = {};
      for (int64_t b = 0; b < g.batch; ++b) {
        if (g.mask && !g.mask[b * g.mask_stride + g.places[i]]) continue;
        Acc x;
        for (int64_t t = 0; t < count; ++t) {
          read(row + b * g.inner + t, &x);
          sum[t] += x;
        }
      }
      for (int64_t t = 0; t < count; ++t) sums[i * g.inner + from + t] = static_cast<Acc>(sum[t]);
    }
  });
}

// G [K, K] of the whole batch.
template <class T>
inline void gram_batch(const Pool& pool, const Grads& g, double* G) {
  using Acc = typename Stored<T>::Vec::Acc;
  Arena arena;
  double* pairs = arena.take<double>(pair_count(g.k));
  if (g.per == Per::batch_sum) {
    Acc* sums = arena.take<Acc>(g.k * g.inner);
    batch_sums<T>(pool, g, sums);
    const Acc* rows[kMaxRows];
    for (int i = 0; i < g.k; ++i) rows[i] = sums + i * g.inner;
    gram_rows(pool, rows, g.k, g.inner, pairs);
    spread(pairs, g.k, g.places, g.K, G);
  } else if (g.mask && g.mask_stride) {
    // a missing sample of a row counts as zero: the masked sum of the samples' Gramians
    sum_units(
        pool, g.batch, g.batch * g.inner * g.k, pair_count(g.k),
        [&](int64_t first, int64_t last, bool, const auto& acc_of) {
          for (int64_t b = first; b < last; ++b) {
            double* acc = acc_of(b);
            Arena scratch;
            int index[kMaxRows], n = 0;
            const T* rows[kMaxRows];
            for (int i = 0; i < g.k; ++i)
              if (g.mask[b * g.mask_stride + g.places[i]]) {
                rows[n] = static_cast<const T*>(g.rows[i]) + b * g.inner;
                index[n++] = i;
              }
            double* own = scratch.take<double>(pair_count(n));
            gram_rows(kSerial, rows, n, g.inner, own);
            for (int i = 0; i < n; ++i)
              for (int j = i; j < n; ++j) acc[pair_index(g.k, index[i], index[j])] += own[pair_index(n, i, j)];
          }
        },
        pairs);
    spread(pairs, g.k, g.places, g.K, G);
  } else {
    const Present<T> p(g, 0, 0);
    gram_rows(pool, p.rows, p.k, g.batch * g.inner, pairs);
    spread(pairs, p.k, p.places, g.K, G);
  }
}

template <class T>
inline void gram_sample(const Grads& g, int64_t b, double* G) {
  Arena arena;
  const Present<T> p(g, b, b * g.inner);
  double* pairs = arena.take<double>(pair_count(p.k));
  gram_rows(kSerial, p.rows, p.k, g.inner, pairs);
  spread(pairs, p.k, p.places, g.K, G);
}

// Diagonal only: 1 where a row has a non-zero (or NaN) element among those the mask leaves in.
template <class T>
inline void presence(const Grads& g, int64_t first, int64_t last, double* G) {
  using Acc = typename Stored<T>::Vec::Acc;
  for (int64_t e = 0; e < static_cast<int64_t>(g.K) * g.K; ++e) G[e] = 0.0;
  for (int i = 0; i < g.k; ++i) {
    bool found = false;
    for (int64_t b = first; b < last && !found; ++b) {
      if (g.mask && !g.mask[b * g.mask_stride + g.places[i]]) continue;
      const T* row = static_cast<const T*>(g.rows[i]) + b * g.inner;
      for (int64_t t = 0; t < g.inner && !found; ++t) {
        Acc x;
        read(row + t, &x);
        found = !(x == 0);
      }
    }
    G[static_cast<int64_t>(g.places[i]) * g.K + g.places[i]] = found ? 1.0 : 0.0;
  }
}

// Rows and weights that enter a sum: those of weight zero are not read when `skip`, for then they are known to be finite or missing.
template <class T>
struct Weighted {
  Present<T> p;
  typename Stored<T>::Vec::Acc w[kMaxRows];
  int k = 0;
  Weighted(const Grads& g, int64_t b, int64_t offset, const double* weights, bool skip) : p(g, b, offset) {
    for (int i = 0; i < p.k; ++i) {
      const double weight = weights[p.places[i]];
      if (skip && weight == 0.0) continue;
      p.rows[k] = p.rows[i];
      w[k++] = static_cast<typename Stored<T>::Vec::Acc>(weight);
    }
  }
};

// One weight per row; samples apart only where the mask tells them apart.
template <class T>
inline void combine_batch(const Pool& pool, const Grads& g, const double* w, bool skip, T* out) {
  if (!g.mask || !g.mask_stride) {
    const Weighted<T> s(g, 0, 0, w, skip);
    return combine_parallel<T>(pool, s.p.rows, s.k, s.w, g.batch * g.inner, out);
  }
  run(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Weighted<T> s(g, b, b * g.inner, w, skip);
      combine_range<T>(s.p.rows, s.k, s.w, 0, g.inner, out + b * g.inner, false);
    }
  });
}

inline void gram(const Pool& pool, const Grads& g, double* G) {
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (g.per != Per::sample) return gram_batch<T>(pool, g, G);
    run(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) gram_sample<T>(g, b, G + b * g.K * g.K);
    });
  });
}

inline void combine(const Pool& pool, const Grads& g, const double* w, void* out) {
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (g.per != Per::sample) return combine_batch<T>(pool, g, w, false, static_cast<T*>(out));
    run(pool, g.batch, g.batch * g.inner * g.k, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Weighted<T> s(g, b, b * g.inner, w + b * g.K, false);
        combine_range<T>(s.p.rows, s.k, s.w, 0, g.inner, static_cast<T*>(out) + b * g.inner, false);
      }
    });
  });
}

inline void resolve(const Pool& pool, const Grads& g, const SolveArgs& args, bool with_gram, void* out) {
  with_gram = with_gram || g.per == Per::batch_sum;  // there a row is missing when its batch sum is zero
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (g.per != Per::sample) {
      double* G = const_cast<double*>(args.G);
      with_gram ? gram_batch<T>(pool, g, G) : presence<T>(g, 0, g.batch, G);
      solve_range(args, 0, 1);
      return combine_batch<T>(pool, g, args.w, with_gram, static_cast<T*>(out));
    }
    // one sample at a time: its rows are still in the first cache when they are combined
    run(pool, g.batch, g.batch * (g.inner * g.k + 64), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        double* G = const_cast<double*>(args.G) + b * args.G_stride;
        with_gram ? gram_sample<T>(g, b, G) : presence<T>(g, b, b + 1, G);
        solve_range(args, b, b + 1);
        const Weighted<T> s(g, b, b * g.inner, args.w + b * args.w_stride, with_gram);
        combine_range<T>(s.p.rows, s.k, s.w, 0, g.inner, static_cast<T*>(out) + b * g.inner, false);
      }
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
