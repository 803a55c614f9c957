// Rules that withstand corrupted gradients: Krum.
#pragma once

#include "problem.h"
#include "sort.h"

namespace mmfast {
namespace MMFAST_ISA {

// Krum and Multi-Krum (Blanchard et al., "Machine learning with adversaries", NIPS 2017): the mean of the rows closest to their neighbours.
// params: number of corrupted rows, number of rows to select, 1 for squared distances.
template <>
struct Rule<19> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "Krum";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 3; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    const int neighbours = k - static_cast<int>(p.params[0]) - 2;
    const int selected = static_cast<int>(fmin(p.params[1], k));
    const bool squared = p.params[2] != 0.0;
    if (neighbours < 1) {  // too few rows are left to tell which are corrupted
      each(team, k, [&](int i) { p.w[i] = 1.0 / k; });
      return;
    }
    double* score = p.work;
    double* distance = score + k;
    each(team, k, [&](int i) {
      for (int j = 0; j < i; ++j) {
        // one half of G serves both: rounding must not tell the distance of a pair from one side and the other
        const double product = p.G[static_cast<long>(j) * k + i];
        const double total = p.G[static_cast<long>(i) * k + i] + p.G[static_cast<long>(j) * k + j];
        const double difference = total - 2.0 * product;
        const double square = difference > 4.0 * p.precision * total ? difference : 0.0;  // below it they are equal as far as the Gramian tells
        distance[i * k + j] = distance[j * k + i] = squared ? square : sqrt(square);
      }
      distance[i * k + i] = HUGE_VAL;  // a row is no neighbour of its own
    });
    sort_columns(team, k, k, distance);
    each(team, k, [&](int i) { score[i] = distance[i]; });
    for (int s = 1; s < neighbours; ++s) each(team, k, [&](int i) { score[i] += distance[s * k + i]; });
    each(team, k, [&](int i) {
      int before = 0;  // rows with a better score; of equal ones the lower index is the better
      for (int j = 0; j < k; ++j) before += (score[j] < score[i]) | ((score[j] == score[i]) & (j < i));
      p.w[i] = before < selected ? 1.0 / selected : 0.0;
    });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
