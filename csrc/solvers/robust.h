// Rules that withstand corrupted gradients: Krum.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace robust {

// rank[j] <- how many of x[0..k-1] come before x[j] in ascending order, equal ones by index. No branches: k passes of k comparisons.
MMFAST_HD inline void ranks(int k, const double* x, double* rank) {
  for (int j = 0; j < k; ++j) rank[j] = 0.0;
  for (int l = 0; l < k; ++l) {
    const double pivot = x[l];
    for (int j = 0; j < l; ++j) rank[j] += pivot < x[j] ? 1.0 : 0.0;
    for (int j = l + 1; j < k; ++j) rank[j] += pivot <= x[j] ? 1.0 : 0.0;
  }
}

}  // namespace robust

// Krum and Multi-Krum (Blanchard et al., "Machine learning with adversaries", NIPS 2017): the mean of the rows closest to their neighbours.
// params: number of corrupted rows, number of rows to select, 1 for squared distances.
template <>
struct Rule<19> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "Krum";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 3; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k, corrupted = static_cast<int>(p.params[0]);
    const int neighbours = k - corrupted - 2;
    const int selected = static_cast<int>(fmin(p.params[1], k));
    const bool squared = p.params[2] != 0.0;
    if (neighbours < 1) {  // too few rows are left to tell which are corrupted
      each(team, k, [&](int i) { p.w[i] = 1.0 / k; });
      return;
    }
    double* score = p.work;
    double* order = score + k;
    each(team, k, [&](int i) {
      double* distance = order + k + 3L * k * i;
      double* rank = distance + k;
      double* sorted = rank + k;
      for (int j = 0; j < k; ++j) {
        // one half of G serves both: rounding must not tell the distance of a pair from one side and the other
        const double product = i < j ? p.G[static_cast<long>(i) * k + j] : p.G[static_cast<long>(j) * k + i];
        const double square = fmax(p.G[static_cast<long>(i) * k + i] + p.G[static_cast<long>(j) * k + j] - 2.0 * product, 0.0);
        distance[j] = squared ? square : sqrt(square);
      }
      distance[i] = HUGE_VAL;
      robust::ranks(k, distance, rank);
      for (int j = 0; j < k; ++j) sorted[static_cast<int>(rank[j])] = distance[j];
      double sum = 0.0;
      for (int j = 0; j < neighbours; ++j) sum += sorted[j];
      score[i] = sum;
    });
    if (team.rank() == 0) robust::ranks(k, score, order);
    team.sync();
    each(team, k, [&](int i) { p.w[i] = order[i] < selected ? 1.0 / selected : 0.0; });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
