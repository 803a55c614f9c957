// Keeping the norm of the plain sum where the Gramian does not know it: lengths measured on the elements, and their sum in double precision, for what
// is left of its summands is as small as their rounding (solvers/norm.h).
#pragma once

#include "gram.h"
#include "grads.h"
#include "solve_batch.h"

namespace mmfast {
namespace MMFAST_ISA {

// Elements [begin, end) of sum_i g_i (if asked for) and sum_i w_i g_i.
template <class T>
inline void sum_exact(const T* const* rows, const double* w, int k, int64_t begin, int64_t end, double* plain, double* resolved) {
  for (int64_t t = 0; t < end - begin; ++t) resolved[t] = 0.0;
  for (int64_t t = 0; plain && t < end - begin; ++t) plain[t] = 0.0;
  for (int i = 0; i < k; ++i) {
    const T* row = rows[i] + begin;
    for (int64_t t = 0; t < end - begin; ++t) resolved[t] = std::fma(w[i], static_cast<double>(load_acc(row + t)), resolved[t]);
    for (int64_t t = 0; plain && t < end - begin; ++t) plain[t] += static_cast<double>(load_acc(row + t));
  }
}

// Squared lengths of the plain sum s and the weighted sum d, as a Gramian of two rows: s's, s'd, d'd.
template <class T>
inline void lengths_of_rows(const Pool& pool, const T* const* rows, const double* w, int k, int64_t n, double* total) {
  sum_units(
      pool, (n + kChunk - 1) / kChunk, n * k, 3,
      [&](int64_t first, int64_t last, bool, const auto& slot_of) {
        Arena arena;
        double* sums[2] = {arena.take<double>(kChunk), arena.take<double>(kChunk)};
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const int64_t begin = chunk * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
          double* slot = slot_of(chunk);
          sum_exact(rows, w, k, begin, end, sums[0], sums[1]);
          gram_chunks<double>(sums, 2, end - begin, 0, 1, false, [&](int64_t) { return slot; });
        }
      },
      total);
}

// The rows of a sample that are there, with their weights in double precision.
template <class T>
struct WeightedRows {
  PresentRows<T> present;
  double w[kMaxRows];
  WeightedRows(const Grads& g, int64_t sample, int64_t offset, const double* weights) : present(g, sample, offset) {
    for (int i = 0; i < present.k; ++i) w[i] = weights[present.row_index[i]];
  }
};

// total is [3], of the whole problem or of one sample.
template <class T>
inline void lengths_batch(const Pool& pool, const Grads& g, const double* w, double* total) {
  if (g.per == Per::batch_sum) {
    Arena arena;
    double* sums = arena.take<double>(g.k * g.inner);
    const double* rows[kMaxRows];
    double weight[kMaxRows];
    batch_sums<T>(pool, g, sums);
    for (int i = 0; i < g.k; ++i) rows[i] = sums + i * g.inner, weight[i] = w[g.row_index[i]];
    lengths_of_rows(pool, rows, weight, g.k, g.inner, total);
  } else if (g.mask && g.mask_stride) {  // samples of a row that are missing count as zero
    sum_units(
        pool, g.batch, g.batch * g.inner * g.k, 3,
        [&](int64_t first, int64_t last, bool, const auto& slot_of) {
          for (int64_t b = first; b < last; ++b) {
            double *slot = slot_of(b), sample[3];
            const WeightedRows<T> rows(g, b, b * g.inner, w);
            lengths_of_rows(kSerial, rows.present.rows, rows.w, rows.present.k, g.inner, sample);
            for (int e = 0; e < 3; ++e) slot[e] += sample[e];
          }
        },
        total);
  } else {
    const WeightedRows<T> rows(g, 0, 0, w);
    lengths_of_rows(pool, rows.present.rows, rows.w, rows.present.k, g.batch * g.inner, total);
  }
}

template <class T>
inline void lengths_sample(const Grads& g, int64_t b, const double* w, double* total) {
  const WeightedRows<T> rows(g, b, b * g.inner, w);
  lengths_of_rows(kSerial, rows.present.rows, rows.w, rows.present.k, g.inner, total);
}

// sum_i w_i g_i of one sample's rows, or of all.
template <class T>
inline void combine_exact(const Pool& pool, const WeightedRows<T>& rows, int64_t n, T* out) {
  constexpr int64_t kBlock = 1024;
  parallel_for(pool, (n + kBlock - 1) / kBlock, n * rows.present.k, [&](int64_t first, int64_t last) {
    double sum[kBlock];
    for (int64_t begin = first * kBlock; begin < last * kBlock && begin < n; begin += kBlock) {
      const int64_t end = begin + kBlock < n ? begin + kBlock : n;
      sum_exact(rows.present.rows, rows.w, rows.present.k, begin, end, static_cast<double*>(nullptr), sum);
      for (int64_t t = begin; t < end; ++t) store_acc(out + t, static_cast<Acc<T>>(sum[t - begin]));
    }
  });
}

// Multiplies the weights of a problem by the factor that keeps the norm; true where it had to be measured.
template <class Lengths>
inline bool keep_norm(int K, const Norm& norm, const Lengths& lengths, double* w) {
  double total[3] = {};
  const bool settled = norm.settled != 0.0;
  if (!settled) lengths(total);
  const double factor = measured_factor(norm, total[0], total[2]);
  for (int i = 0; i < K; ++i) w[i] *= factor;
  return !settled;
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
