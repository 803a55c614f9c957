// The weighted sum of the rows at one element: in order, one rounding at the end, as cpu/combine.h has it.
#pragma once

#include "gram.h"

namespace mmfast {
namespace MMFAST_ISA {

template <class T>
MMFAST_BLOCK inline Acc<T> weighted(const Rows& rows, const double* w, int64_t sample, int64_t t, bool skip) {
  const bool* mask = rows.mask ? rows.mask + sample * rows.mask_stride : nullptr;
  Acc<T> sum = -Acc<T>(0);  // so that a first product of minus zero stays one
  bool any = false;
  for (int i = 0; i < rows.k; ++i) {
    const int place = rows.places[i];
    const double weight = w[place];
    if ((mask && !mask[place]) || (skip && weight == 0.0)) continue;
    sum = fused(static_cast<Acc<T>>(weight), number(static_cast<const T*>(rows.at[i]) + t), sum);
    any = true;
  }
  return any ? sum : Acc<T>(0);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
