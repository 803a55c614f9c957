// The weighted sum of rows: in order, one rounding at the end, as cpu/combine.h has it.
#pragma once

#include "gram.h"

namespace mmfast {
namespace MMFAST_ISA {

// Whether a row enters the sum: masked rows are not read, nor those of weight zero when `skip`.
template <class RowSet>
MMFAST_BLOCK inline bool enters(const RowSet& rows, int row, const double* w, const bool* mask, bool skip) {
  const int place = rows.places[row];
  return !(mask && !mask[place]) && !(skip && w[place] == 0.0);
}

// sum[e] at element t + e * stride, of rows and weights that enter.
template <class T, int E>
MMFAST_BLOCK inline void weighted(const T* const* at, const Acc<T>* w, int count, int64_t t, int stride, Acc<T>* sum) {
#pragma unroll
  for (int e = 0; e < E; ++e) sum[e] = count ? -Acc<T>(0) : Acc<T>(0);  // so that a first product of minus zero stays one
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    Acc<T> x[E];
#pragma unroll
    for (int e = 0; e < E; ++e) x[e] = number(at[i] + t + e * stride);
#pragma unroll
    for (int e = 0; e < E; ++e) sum[e] = fused(w[i], x[e], sum[e]);
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
