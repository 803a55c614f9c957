// Rules that keep the direction in the cone where no gradient conflicts with it: UPGrad, DualProj, PCD.
//
// All are solved on the cosines C of the gradients, so that a constraint weighs the same whatever its gradient's norm.
#pragma once

#include "nnls.h"
#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

// norms[i] = |g_i|, C = the cosines of all pairs
template <class Team>
MMFAST_HD inline void cosines(const Team& team, int k, const double* G, double* norms, double* C) {
  each(team, k, [&](int i) { norms[i] = sqrt(G[static_cast<long>(i) * k + i]); });
  each(team, k, [&](int i) {
    const double* g = G + static_cast<long>(i) * k;
    double* c = C + static_cast<long>(i) * k;
    const double own = norms[i];
    for (int j = 0; j < k; ++j) c[j] = g[j] / (own * norms[j]);
    c[i] = 1.0;
  });
}

MMFAST_HD inline double preference(const Problem& p, int i) { return p.n_params ? p.params[p.rows[i]] : 1.0 / p.k; }

// Quinton & Rey, "Jacobian descent for multi-objective optimization" (2024): the sum of the K gradients' projections on the dual cone.
template <>
struct Rule<8> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "UPGrad";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    double* C = p.work;
    double* norms = C + static_cast<long>(k) * k;
    cosines(team, k, p.G, norms, C);
    NonNegative<Team> qp(team, k, C, norms + k, p.iwork);
    each(team, k, [&](int i) { p.w[i] = preference(p, i); });
    for (int i = 0; i < k; ++i) {
      const double* row = C + static_cast<long>(i) * k;
      double least = 0.0;
      for (int j = 0; j < k; ++j) least = fmin(least, row[j]);
      const double size = preference(p, i) * norms[i];
      if (least == 0.0 || size == 0.0) continue;
      each(team, k, [&](int j) { qp.q[j] = row[j]; });
      qp.solve(1.0, true);
      each(team, k, [&](int j) { p.w[j] += size * qp.x[j] / norms[j]; });
    }
  }
};

// Lopez-Paz & Ranzato, "Gradient episodic memory" (2017): the projection of the weighted sum on the dual cone.
template <>
struct Rule<9> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "DualProj";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    double* C = p.work;
    double* norms = C + static_cast<long>(k) * k;
    cosines(team, k, p.G, norms, C);
    NonNegative<Team> qp(team, k, C, norms + k, p.iwork);
    const double reach = team.sum(k, [&](int i) { return preference(p, i) * norms[i]; });
    each(team, k, [&](int i) { qp.q[i] = 0.0; });
    for (int j = 0; j < k; ++j) {
      const double u = preference(p, j) * norms[j];
      const double* row = C + static_cast<long>(j) * k;
      each(team, k, [&](int i) { qp.q[i] += u * row[i]; });
    }
    qp.solve(reach, true);
    each(team, k, [&](int i) { p.w[i] = preference(p, i) + qp.x[i] / norms[i]; });
  }
};

// "Not all objectives are born equal: priority-constrained descent" (2026): the direction nearest to the first gradient along which
// every other one makes a share tau of its own progress, each measured by its average norm; then given the first one's norm.
// The state holds the K averages of |g_i|^2 and the total weight of what was averaged, 1 - beta^n. A missing row keeps its
// average; one seen for the first time starts at its own. The primary is the first row present.
template <>
struct Rule<10> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "PCD";
  MMFAST_HD static int state_size(int K) { return K + 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k, m = k - 1;
    const double tau = p.params[0], beta = p.params[1];
    double* C = p.work;
    double* norms = C + static_cast<long>(k) * k;
    double* length = norms + k;  // |g_i| over its average
    double* others = length + k;  // [m, m] cosines of the secondary gradients
    const double kept = beta * p.state[p.K], total = kept + (1.0 - beta);
    team.sync();
    each(team, k, [&](int i) {
      double& average = p.state[p.rows[i]];
      const double square = p.G[static_cast<long>(i) * k + i] * p.scale;
      average = average > 0.0 ? (kept * average + (1.0 - beta) * square) / total : square;
      length[i] = sqrt(square / average);
    });
    if (team.rank() == 0) p.state[p.K] = total;
    cosines(team, k, p.G, norms, C);
    NonNegative<Team> qp(team, m, others, others + static_cast<long>(m) * m, p.iwork);
    each(team, m, [&](int i) {
      const double* row = C + static_cast<long>(i + 1) * k;
      for (int j = 0; j < m; ++j) others[static_cast<long>(i) * m + j] = row[j + 1];
      qp.q[i] = length[0] * row[0] - tau * length[i + 1];
    });
    const double reach = team.sum(k, [&](int i) { return i == 0 ? length[0] : tau * length[i]; });
    const bool feasible = qp.solve(reach, false);

    // |d|^2 of d = length_1 c_1 + sum_j x_j c_j; below the rounding of its own summands d is zero
    double* v = length;
    if (feasible) each(team, m, [&](int i) { v[i + 1] = qp.x[i]; });
    const double square = team.sum(k * k, [&](int e) { return v[e / k] * C[e] * v[e % k]; });
    const double sum = team.sum(k, [&](int i) { return v[i]; });
    const double factor = square > 1e-14 * sum * sum ? norms[0] / sqrt(square) : 0.0;
    each(team, k, [&](int i) { p.w[i] = feasible ? factor * v[i] / norms[i] : (i == 0 ? 1.0 : 0.0); });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
