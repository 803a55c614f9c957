// Keeping the norm of the plain sum where the Gramian does not know it: lengths measured on the elements, and their sum in double precision
// (solvers/norm.h). Sums have the order of cpu/norm.h.
#pragma once

#include "gram.h"

namespace mmfast {
namespace MMFAST_ISA {

// The plain sum s and the weighted sum d of rows at an element, as two rows in double precision.
template <class T, class RowSet>
struct Sums {
  const RowSet& rows;
  const double* w;       // [K]
  int64_t batch, inner;  // where s and d are of sums over a batch; batch is 0 elsewhere
  int64_t sample;        // that is a problem of its own, else 0
  const bool* mask;      // of the unit at hand, or null
  int64_t offset;
  MMFAST_BLOCK void start(int64_t unit, int64_t unit_offset) {
    mask = rows.mask && !batch ? rows.mask + (sample + unit) * rows.mask_stride : nullptr;
    offset = sample * inner + unit_offset;
  }
  MMFAST_BLOCK double element(int row, int64_t e) const {
    const T* from = static_cast<const T*>(rows.ptr[row]) + offset + e;
    if (!batch) return static_cast<double>(load_acc(from));
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      if (!rows.mask || rows.mask[b * rows.mask_stride + rows.row_index[row]]) sum += static_cast<double>(load_acc(from + b * inner));
    return sum;
  }
  MMFAST_BLOCK void load(int64_t e, double* x, double*) const {
    double plain = 0.0, resolved = 0.0;
    for (int i = 0; i < rows.k; ++i) {
      if (mask && !mask[rows.row_index[i]]) continue;
      const double value = element(i, e);
      plain += value;
      resolved = fma_rn(w[rows.row_index[i]], value, resolved);
    }
    x[0] = plain, x[1] = resolved;
  }
};

// Squared lengths of one slot: s's, s'd, d'd.
template <class Source>
MMFAST_BLOCK inline void lengths_slot(const Block& block, Source& source, const Units& units, int64_t slot, double* shared, double* out) {
  typename ChainReduce<double, 3>::PairSums slot_sums;
  sum_slot<double, 2, 0>(block, source, units, slot, shared, slot_sums);
  store_pairs<double, 2, 0>(block, 2, 0, 0, slot_sums, out);
}

// One of the three of a problem: its slots in order.
MMFAST_BLOCK inline double sum_lengths(const double* slots, int64_t count, int which) {
  double sum = 0.0;
  for (int64_t s = 0; s < count; ++s) sum += slots[s * 3 + which];
  return sum;
}

// Elements e + i * stride, i below E, of the weighted sum in double precision; the rows that take part in it with their weights.
template <class T, int E>
MMFAST_BLOCK inline void weighted_sum_exact(const T* const* ptr, const double* w, int count, int64_t e, int stride, T* out) {
  double sum[E] = {};
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int u = 0; u < E; ++u) sum[u] = fma_rn(w[i], static_cast<double>(load_acc(ptr[i] + e + u * stride)), sum[u]);
#pragma unroll
  for (int u = 0; u < E; ++u) store_acc(out + e + u * stride, static_cast<Acc<T>>(sum[u]));
}

// Accumulators in shared memory that lengths_slot needs: of one round of three pairs.
constexpr int kLengthsShared = 3 * ChainReduce<double, 3>::stride;

}  // namespace MMFAST_ISA
}  // namespace mmfast
