// Sizes of gradients that were seen at different calls, in one unit.
//
// The gradients of a call have a factor in common that says nothing about them, the loss scale, and it may be another one at the next call. So
// only ratios within a call count. Rows whose sizes are comparable form a set; where rows of several sets meet in a call, the sets become one, in
// the unit in which they have changed alike in the mean: the same as one unit for all where the scale stays and gradients keep their length.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace units {

// The mean of ratio * unit over the rows of a set that take part.
MMFAST_HD inline double mean_change(const Problem& p, const double* ratio, const double* set, const double* unit, double of) {
  double sum = 0.0, count = 0.0;
  for (int i = 0; i < p.k; ++i) {
    const int row = p.row_index[i];
    if (set[row] != of) continue;
    sum += ratio[i] * unit[row];
    count += 1.0;
  }
  return sum / count;
}

// Sizes are now ratio[i] times what is kept of them. set [K] is numbered by its first row, from 1; a row with none yet (0) makes one, with a ratio
// of 1. Afterwards ratio[i] * unit[row_index[i]] are comparable.
template <class Team>
MMFAST_HD inline void to_one_unit(const Team& team, const Problem& p, const double* ratio, double* set, double* unit) {
  team.sync();
  if (team.rank() == 0) {
    double own = 0.0;
    for (int i = 0; i < p.k; ++i) {
      const int row = p.row_index[i];
      if (set[row] != 0.0) continue;
      if (own == 0.0) own = row + 1.0;
      set[row] = own;
      unit[row] = 1.0;
    }
    const double into = set[p.row_index[0]];
    double mean = 0.0;
    for (int i = 1; i < p.k; ++i) {
      const double from = set[p.row_index[i]];
      if (from == into) continue;
      if (mean == 0.0) mean = mean_change(p, ratio, set, unit, into);
      const double factor = mean / mean_change(p, ratio, set, unit, from);
      for (int row = 0; row < p.K; ++row)
        if (set[row] == from) {
          unit[row] *= factor;
          set[row] = into;
        }
    }
  }
  team.sync();
}

}  // namespace units

}  // namespace MMFAST_ISA
}  // namespace mmfast
