// The weighted sum of rows: in order, one rounding at the end, as cpu/combine.h has it.
#pragma once

#include "gram.h"

namespace mmfast {
namespace MMFAST_ISA {

// Whether a row takes part in the sum: masked rows are not read, nor those of weight zero when `skip`.
template <class RowSet>
MMFAST_BLOCK inline bool is_active(const RowSet& rows, int row, const double* w, const bool* mask, bool skip) {
  const int index = rows.row_index[row];
  return !(mask && !mask[index]) && !(skip && w[index] == 0.0);
}

// sum[e] at element t + e * stride, of active rows and their weights.
template <class T, int E>
MMFAST_BLOCK inline void weighted_sum(const T* const* ptr, const Acc<T>* w, int count, int64_t t, int stride, Acc<T>* sum) {
#pragma unroll
  for (int e = 0; e < E; ++e) sum[e] = count ? -Acc<T>(0) : Acc<T>(0);  // so that a first product of minus zero stays one
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    Acc<T> x[E];
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = load_acc(ptr[i] + t + e * stride);
#pragma unroll
    for (int e = 0; e < E; ++e) sum[e] = fma_rn(w[i], x[e], sum[e]);
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
