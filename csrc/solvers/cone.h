// Rules that keep the direction in the cone where no gradient conflicts with it: UPGrad, DualProj, PCD.
//
// All are solved on the cosines C of the gradients, so that a constraint weighs the same whatever its gradient's norm.
#pragma once

#include "linalg.h"
#include "nnls.h"
#include "problem.h"
#include "units.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace cone {

// min 1/2 l'Cl + q'l over l >= 0 with C the cosines of the rows; q is to be filled. C is written to p.work, norms [k] are behind it, the solver's own
// numbers behind them.
template <class Team>
MMFAST_HD inline NonNegative<Team> on_cosines(const Team& team, const Problem& p, double* norms) {
  cosines(team, p.k, p.G, norms, p.work);
  return {team, p.k, p.work, norms + p.k, p.iwork};
}

}  // namespace cone

// Quinton & Rey, "Jacobian descent for multi-objective optimization" (2024): the sum of the K gradients' projections on the dual cone.
template <>
struct Rule<8> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "UPGrad";
  MMFAST_HD static bool takes(int K, int n_params) { return n_params == 0 || n_params == K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    double* norms = p.work + static_cast<long>(k) * k;
    NonNegative<Team> qp = cone::on_cosines(team, p, norms);
    each(team, k, [&](int i) { p.w[i] = preference(p, i, 0, 1.0 / k); });
    for (int i = 0; i < k; ++i) {
      const double* row = qp.C + static_cast<long>(i) * k;
      double least = 0.0;
      for (int j = 0; j < k; ++j) least = fmin(least, row[j]);
      const double length = preference(p, i, 0, 1.0 / k) * norms[i];
      if (least == 0.0 || length == 0.0) continue;
      each(team, k, [&](int j) { qp.q[j] = row[j]; });
      qp.solve(1.0, true);
      each(team, k, [&](int j) { p.w[j] += length * qp.x[j] / norms[j]; });
    }
  }
};

// Lopez-Paz & Ranzato, "Gradient episodic memory" (2017): the projection of the weighted sum on the dual cone.
template <>
struct Rule<9> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "DualProj";
  MMFAST_HD static bool takes(int K, int n_params) { return n_params == 0 || n_params == K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    double* norms = p.work + static_cast<long>(k) * k;
    NonNegative<Team> qp = cone::on_cosines(team, p, norms);
    const double norm_bound = team.sum(k, [&](int i) { return preference(p, i, 0, 1.0 / k) * norms[i]; });
    each(team, k, [&](int i) { qp.q[i] = 0.0; });
    for (int j = 0; j < k; ++j) {
      const double length = preference(p, j, 0, 1.0 / k) * norms[j];
      const double* row = qp.C + static_cast<long>(j) * k;
      each(team, k, [&](int i) { qp.q[i] += length * row[i]; });
    }
    qp.solve(norm_bound, true);
    each(team, k, [&](int i) { p.w[i] = preference(p, i, 0, 1.0 / k) + qp.x[i] / norms[i]; });
  }
};

// "Not all objectives are born equal: priority-constrained descent" (2026): the direction nearest to the first gradient along which
// every other one makes a share tau of its own progress, each measured by its average norm; then given the first one's norm.
// The state holds the K averages of |g_i|^2, the total weight of what was averaged, 1 - beta^n, and the sets and units of the averages: each call's
// squares count relative to what they are in the mean over the averages, so that a loss scale that changes changes no average. A missing row keeps
// its average; one seen for the first time starts at its own. The primary is the first row present.
template <>
struct Rule<10> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "PCD";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  MMFAST_HD static int state_size(int K) { return 3 * K + 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k, m = k - 1;
    const double tau = p.params[0], beta = p.params[1];
    double* C = p.work;
    double* norms = C + static_cast<long>(k) * k;
    double* length = norms + k;  // |g_i| over its average
    double* others = length + k;  // [m, m] cosines of the secondary gradients
    double *set = p.state + p.K + 1, *unit = set + p.K, *change = others;
    const double old_weight = beta * p.state[p.K], total_weight = old_weight + (1.0 - beta);
    each(team, k, [&](int i) {
      double& average = p.state[p.row_index[i]];
      const double square = p.G[static_cast<long>(i) * k + i] * p.scale;
      if (average == 0.0) average = square;
      change[i] = square / average;
    });
    units::to_one_unit(team, p, change, set, unit);
    const double common = units::mean_change(p, change, set, unit, set[p.row_index[0]]);
    team.sync();
    each(team, k, [&](int i) {
      double& average = p.state[p.row_index[i]];
      const double square = p.G[static_cast<long>(i) * k + i] * p.scale * unit[p.row_index[i]];
      average = (old_weight * average + (1.0 - beta) * (square / common)) / total_weight;
      length[i] = sqrt(square / average);
    });
    if (team.rank() == 0) p.state[p.K] = total_weight;
    cosines(team, k, p.G, norms, C);
    NonNegative<Team> qp(team, m, others, others + static_cast<long>(m) * m, p.iwork);
    each(team, m, [&](int i) {
      const double* row = C + static_cast<long>(i + 1) * k;
      for (int j = 0; j < m; ++j) others[static_cast<long>(i) * m + j] = row[j + 1];
      qp.q[i] = length[0] * row[0] - tau * length[i + 1];
    });
    const double norm_bound = team.sum(k, [&](int i) { return i == 0 ? length[0] : tau * length[i]; });
    bool feasible = qp.solve(norm_bound, false);

    // A lift lets every contradiction be solved, by weights that only it stops: without it half of what a constraint asks for must be left.
    const double lift = p.lift / (1.0 + p.lift);
    const double violated = team.sum(m, [&](int i) {
      const double* row = C + static_cast<long>(i + 1) * k;
      double slack = length[0] * row[0] - tau * length[i + 1] - lift * qp.x[i];
      for (int j = 0; j < m; ++j) slack += row[j + 1] * qp.x[j];
      return slack < -0.5 * tau * length[i + 1] - 1e-6 * norm_bound ? 1.0 : 0.0;
    });
    feasible = feasible && (p.lift == 0.0 || violated == 0.0);

    // |d|^2 of d = length_1 c_1 + sum_j x_j c_j. Below the rounding of its own summands it is zero, which no constraint with
    // tau > 0 allows: then the constraints contradict each other after all.
    each(team, m, [&](int i) { length[i + 1] = qp.x[i]; });
    const double square = quadratic_form(team, k, C, length);
    const double sum = team.sum(k, [&](int i) { return length[i]; });
    const bool vanishes = square <= 1e-14 * sum * sum;
    feasible = feasible && !(vanishes && tau > 0.0);
    const double factor = vanishes ? 0.0 : norms[0] / sqrt(square);
    each(team, k, [&](int i) { p.w[i] = feasible ? factor * length[i] / norms[i] : (i == 0 ? 1.0 : 0.0); });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
