// Rules that look at the norms alone, or at the weights of the step before: Unit, DBMTL, GradNorm, NSGD, CRMOGM.
#pragma once

#include "problem.h"
#include "units.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace magnitude {

// Counts the call and keeps the norms of the call number update_at in first_norms, or of the first one after it that has the row.
// norm[i] <- the true norm; change[i] <- norm over kept norm, in one unit (over 1 until one is kept).
template <class Team>
MMFAST_HD inline void track_norms(const Team& team, const Problem& p, double update_at, double* first_norms, double* set, double* unit, double* calls,
                                  double* norm, double* change) {
  const double call = *calls + 1.0;
  team.sync();
  if (team.rank() == 0) *calls = call;
  const double scale = sqrt(p.scale);
  each(team, p.k, [&](int i) {
    double& first_norm = first_norms[p.row_index[i]];
    norm[i] = scale * sqrt(p.G[static_cast<long>(i) * p.k + i]);
    if (call >= update_at && first_norm == 0.0) first_norm = norm[i];
    change[i] = first_norm > 0.0 ? norm[i] / first_norm : norm[i];
  });
  if (call < update_at) return;
  units::to_one_unit(team, p, change, set, unit);
  each(team, p.k, [&](int i) { change[i] *= unit[p.row_index[i]]; });
}

}  // namespace magnitude

// Unit rows, as a step before others: w = 1 / norm.
template <>
struct Rule<20> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "Unit";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const double scale = sqrt(p.scale);
    each(team, p.k, [&](int i) { p.w[i] = 1.0 / (scale * sqrt(p.G[static_cast<long>(i) * p.k + i])); });
  }
};

// The magnitudes of DB-MTL (Lin et al., "Dual-balancing for multi-task learning", 2023): all rows as long as the longest.
template <>
struct Rule<21> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "DBMTL";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    double most = 0.0;
    for (int i = 0; i < p.k; ++i) most = fmax(most, p.G[static_cast<long>(i) * p.k + i]);
    each(team, p.k, [&](int i) { p.w[i] = sqrt(most) / sqrt(p.G[static_cast<long>(i) * p.k + i]); });
  }
};

// GradNorm (Chen et al., ICML 2018) as modified by Javaloy et al. (ICML 2022): the change of the gradient norms stands for that of
// the losses, and the softmax logits of the weights take one Adam step a call, in closed form.
// params: alpha, lr, update_at. State: logits, their two moments, first norms, steps of each row, sets and units of the first norms; calls.
template <>
struct Rule<16> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "GradNorm";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 3; }
  MMFAST_HD static int state_size(int K) { return 7 * K + 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    constexpr double kBeta1 = 0.9, kBeta2 = 0.999, kAdamEps = 1e-8;  // the gradient that meets kAdamEps has no scale
    const double same = fmax(1e-12, 4.0 * p.precision);              // two norms closer than this are equal but for rounding
    const int k = p.k, K = p.K;
    const double alpha = p.params[0], lr = p.params[1];
    double *logit = p.state, *moment1 = logit + K, *moment2 = moment1 + K, *first_norms = moment2 + K, *steps = first_norms + K, *set = steps + K, *unit = set + K;
    double *norm = p.work, *change = norm + k, *slope = change + k;
    magnitude::track_norms(team, p, p.params[2], first_norms, set, unit, unit + K, norm, change);

    double max_logit = logit[p.row_index[0]];
    for (int i = 1; i < k; ++i) max_logit = fmax(max_logit, logit[p.row_index[i]]);
    const double total = team.sum(k, [&](int i) { return exp(logit[p.row_index[i]] - max_logit); });
    each(team, k, [&](int i) { p.w[i] = k * exp(logit[p.row_index[i]] - max_logit) / total; });

    const double mean = team.sum(k, [&](int i) { return norm[i]; }) / k;
    const double mean_change = team.sum(k, [&](int i) { return change[i]; }) / k;
    const double mean_weighted = team.sum(k, [&](int i) { return p.w[i] * (norm[i] / mean); }) / k;
    each(team, k, [&](int i) {
      const double size = norm[i] / mean, weighted = p.w[i] * size;
      const double target = mean_weighted * pow(change[i] / mean_change, alpha);
      const double gap = weighted - target;
      slope[i] = fabs(gap) <= same * (weighted + target) ? 0.0 : copysign(size, gap);
    });
    const double mean_slope = team.sum(k, [&](int i) { return p.w[i] * slope[i]; }) / k;
    each(team, k, [&](int i) {
      const int row = p.row_index[i];
      const double gradient = p.w[i] * (slope[i] - mean_slope);  // through the softmax
      const double step = steps[row] += 1.0;
      moment1[row] = kBeta1 * moment1[row] + (1.0 - kBeta1) * gradient;
      moment2[row] = kBeta2 * moment2[row] + (1.0 - kBeta2) * gradient * gradient;
      const double direction = moment1[row] / (1.0 - pow(kBeta1, step));
      const double spread = sqrt(moment2[row] / (1.0 - pow(kBeta2, step)));
      logit[row] -= lr * direction / (spread + kAdamEps);
    });
  }
};

// NSGD: the scaling part of RotoGrad (Javaloy and Valera, ICLR 2022): one common norm, the mean of all norms weighted by their change.
// params: update_at. State: sets, units and first norms of each row; calls.
template <>
struct Rule<17> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "NSGD";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  MMFAST_HD static int state_size(int K) { return 3 * K + 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    double *norm = p.work, *change = norm + p.k;
    double *set = p.state, *unit = set + p.K, *first_norms = unit + p.K;
    magnitude::track_norms(team, p, p.params[0], first_norms, set, unit, first_norms + p.K, norm, change);
    const double total = team.sum(p.k, [&](int i) { return change[i]; });
    const double target = team.sum(p.k, [&](int i) { return change[i] / total * norm[i]; });
    each(team, p.k, [&](int i) { p.w[i] = target / norm[i]; });
  }
};

// CR-MOGM (Zhou et al., "On the convergence of stochastic multi-objective gradient manipulation and beyond", NeurIPS 2022):
// the running mean of the weights of the step before, which for c times the gradients are c^degree times those for the gradients.
// params: alpha, degree. State: the running mean of each row; 1 for the rows that have one; where the degree is not 0, their first norms, sets and units.
template <>
struct Rule<18> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool smooths = true;
  static constexpr const char* name = "CRMOGM";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  MMFAST_HD static int state_size(int K) { return 5 * K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const double alpha = p.params[0], degree = p.params[1];
    double *mean = p.state, *seen = mean + p.K, *first_norms = seen + p.K, *set = first_norms + p.K, *unit = set + p.K;
    double common = 1.0;
    if (degree != 0.0) {
      const double scale = sqrt(p.scale);
      each(team, p.k, [&](int i) {
        const double norm = scale * sqrt(p.G[static_cast<long>(i) * p.k + i]);
        double& first_norm = first_norms[p.row_index[i]];
        if (first_norm == 0.0) first_norm = norm;
        p.work[i] = norm / first_norm;
      });
      units::to_one_unit(team, p, p.work, set, unit);
      common = units::mean_change(p, p.work, set, unit, set[p.row_index[0]]);
    }
    each(team, p.k, [&](int i) {
      const int row = p.row_index[i];
      const double factor = degree != 0.0 ? pow(common / unit[row], degree) : 1.0;  // weights over it are of gradients in the row's unit
      mean[row] = seen[row] != 0.0 ? alpha * mean[row] + (1.0 - alpha) * (p.w[i] / factor) : p.w[i] / factor;
      p.w[i] = mean[row] * factor;
      seen[row] = 1.0;
    });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
