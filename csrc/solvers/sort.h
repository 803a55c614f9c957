// Sorts many short columns at once: no branch depends on the data, so a loop over columns runs in vectors and in lockstep.
#pragma once

#include "team.h"

namespace mmfast {
namespace MMFAST_ISA {

// Sorts each of the `columns` columns of a[n, columns] in ascending order (Batcher's merge exchange; Knuth, vol. 3, 5.2.2, algorithm M).
template <class Team>
MMFAST_HD inline void sort_columns(const Team& team, int n, int columns, double* a) {
  int top = 1;
  while (2 * top < n) top *= 2;
  for (int p = n > 1 ? top : 0; p > 0; p /= 2)
    for (int q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int i = 0; i < n - d; ++i) {
        if ((i & p) != r) continue;
        double* __restrict__ low = a + static_cast<long>(i) * columns;
        double* __restrict__ high = low + static_cast<long>(d) * columns;
        each(team, columns, [=](int c) {
          const double x = low[c], y = high[c];
          low[c] = x < y ? x : y;
          high[c] = x < y ? y : x;
        });
      }
      if (q == p) break;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
