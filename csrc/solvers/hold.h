// Weights that are kept over calls: what `every` of a rule adds to it as a step of its own.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

// The weights of the step before, which is solved at every R-th call and whenever a row comes that was not there when it was; in between the driver
// leaves it out. For c times the gradients they are c^degree times those for the gradients; c is the mean change of the norms since.
// params: R, degree. State: the weights; the norms of the rows that were there, else 0; the calls since.
template <>
struct Rule<23> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool smooths = true;
  static constexpr bool holds = true;
  static constexpr bool reads_gramian = false;  // but the norms, where the step before looks at it
  static constexpr const char* name = "Hold";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  MMFAST_HD static int state_size(int K) { return 2 * K + 1; }
  MMFAST_HD static bool due(const Problem& p, const double* params, const double* state) {
    const double *norms = state + p.K, calls = norms[p.K];
    bool all_known = true;
    for (int i = 0; i < p.k; ++i) all_known = all_known && norms[p.row_index[i]] != 0.0;
    return calls == 0.0 || calls >= params[0] || !all_known;
  }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const double scale = sqrt(p.scale);
    double *kept = p.state, *norms = kept + p.K, *calls = norms + p.K;
    const bool solved = due(p, p.params, p.state);
    team.sync();  // before anyone changes what the others look at
    if (solved) {
      each(team, p.K, [&](int row) { kept[row] = norms[row] = 0.0; });
      each(team, p.k, [&](int i) {
        kept[p.row_index[i]] = p.w[i];
        norms[p.row_index[i]] = scale * sqrt(p.G[static_cast<long>(i) * p.k + i]);
      });
    } else {
      double factor = 1.0;
      if (p.params[1] != 0.0) {
        const double change = team.sum(p.k, [&](int i) { return scale * sqrt(p.G[static_cast<long>(i) * p.k + i]) / norms[p.row_index[i]]; }) / p.k;
        factor = pow(change, p.params[1]);
      }
      each(team, p.k, [&](int i) { p.w[i] = factor * kept[p.row_index[i]]; });
    }
    const double next = solved ? 1.0 : *calls + 1.0;
    team.sync();
    if (team.rank() == 0) *calls = next;
    team.sync();
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
