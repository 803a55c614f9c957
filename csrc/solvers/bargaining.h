// Rules where the rows bargain for utility: NashMTL, FairGrad.
//
// Both ask for w > 0 with G w = w^(-1/alpha), alpha = 1 for Nash: the minimum of the strictly convex
// w'Gw / 2 - sum_i w_i^(1 - 1/alpha) / (1 - 1/alpha). The unknowns are x = D w, D the norms, so that the quadratic term is x'Cx with
// C the cosines and badly scaled rows do no harm. Newton's step is taken on log x and cut off at a factor of e^2: x stays positive,
// and a line search was found to slow it down only. Below alpha = 1/2 the powers bend too much for a whole step: there it goes on x, to where the
// slope along it is a tenth of what it was, and never below what every solution exceeds (no pull is larger than the sum of all x).
//
// Where some w > 0 has G w ~ 0 (a Pareto-stationary point) the minimum runs off to infinity while the direction vanishes. A steep
// barrier stops x at about the ceiling, kFlat^(-h) times the most a row takes alone, with h = alpha/(1 + alpha): where an eigenvalue kFlat
// of C would let it go; below alpha = 1/2 h is up to 1.3 times as much, where the curvature of the pull is still more than the rounding of C. The right-hand side is multiplied by 1 - (x / ceiling)^(4 + 4/alpha), so that
// an eigenvalue of 1e-7 feels (kFlat / 1e-7)^4 = 1e-12 of it; at alpha = 1 the direction keeps about 1e-5 of its usual length.
#pragma once

#include "linalg.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace bargaining {

constexpr double kFlat = 1e-10;
constexpr int kMaxNewton = 100, kMaxNewtonOfHighPowers = 400, kMaxSearch = 12;

// One row's side of the bargain: (C x)_i = pull(m_i, x_i), with m = d^((1 - alpha)/(1 + alpha)) what the row takes alone.
struct Side {
  double power;    // 1 / alpha
  double ceiling;

  MMFAST_HD double barrier(double x) const {
    const double u = x / ceiling;
    if (u < 1e-4) return 0.0;
    const double u2 = u * u, u4 = u2 * u2;
    return power == 1.0 ? u4 * u4 : u4 * pow(u4, power);
  }
  MMFAST_HD double free_pull(double m, double x) const { return power == 1.0 ? m * m / x : m * pow(m / x, power); }
  // -x times the derivative of pull, over free_pull
  MMFAST_HD double bend(double barrier) const { return power + (4.0 + 3.0 * power) * barrier; }
};

MMFAST_HD inline double ceiling_height(double alpha) {
  const double h = alpha / (1.0 + alpha);
  return alpha >= 0.5 ? h : fmin(1.0 / 3.0, 1.3 * h);
}

// How far to go from x along a step: to where the slope of the objective is a tenth of `slope`, above `lowest`. Cx is C x.
template <class Team>
MMFAST_APART double step_length(const Team& team, const Side& side, int k, const double* C, const double* m, const double* x, const double* Cx, const double* step,
                                const double* lowest, double slope) {
  const double linear = team.sum(k, [&](int i) { return Cx[i] * step[i]; }), square = quadratic_form(team, k, C, step);
  double most = HUGE_VAL;
  for (int i = 0; i < k; ++i)
    if (step[i] < 0.0) most = fmin(most, (lowest[i] - x[i]) / step[i]);
  double left = 0.0, right = most, t = fmin(1.0, 0.9 * most);
  for (int trial = 0; trial < kMaxSearch; ++trial) {
    const double pulled = team.sum(k, [&](int i) {
      const double y = x[i] + t * step[i];
      return side.free_pull(m[i], y) * (1.0 - side.barrier(y)) * step[i];
    });
    const double curve = team.sum(k, [&](int i) {
      const double y = x[i] + t * step[i];
      return side.free_pull(m[i], y) / y * side.bend(side.barrier(y)) * step[i] * step[i];
    });
    const double here = linear + t * square - pulled;
    if (!(fabs(here) > 0.1 * fabs(slope))) break;
    (here > 0.0 ? right : left) = t;
    double next = t - here / (square + curve);
    if (!(next > left && next < right)) next = right < HUGE_VAL ? 0.5 * (left + right) : 2.0 * t;
    t = fmin(next, 8.0 * t);
    if (right == most) t = fmin(t, left + 0.9 * (right - left));
  }
  return t;
}

// w with G w = w^(-1/alpha), for the Gramian divided by p.scale.
template <class Team>
MMFAST_HD inline void solve(const Team& team, Problem& p, double alpha) {
  const int k = p.k;
  double* C = p.work;
  double* H = C + k * k;
  double* norm = H + k * k;
  double* m = norm + k;
  double* x = m + k;
  double* Cx = x + k;
  double* curve = Cx + k;
  double* step = curve + k;
  double* lowest = step + k;
  double* direction = lowest + k;
  cosines(team, k, p.G, norm, C);
  each(team, k, [&](int i) { m[i] = alpha == 1.0 ? 1.0 : pow(norm[i], (1.0 - alpha) / (1.0 + alpha)); });
  double max_m = 0.0;
  for (int i = 0; i < k; ++i) max_m = fmax(max_m, m[i]);
  const Side side{1.0 / alpha, max_m * pow(kFlat, -ceiling_height(alpha))};
  const bool searches = alpha < 0.5;

  // the best multiple of what the rows would take alone
  multiply(team, k, C, k, m, Cx);
  const double alone = team.sum(k, [&](int i) { return m[i] * m[i]; });
  const double together = fmax(team.sum(k, [&](int i) { return m[i] * Cx[i]; }), 1e-6 * alone);
  const double start = alpha == 1.0 ? sqrt(alone / together) : pow(alone / together, alpha / (1.0 + alpha));
  each(team, k, [&](int i) {
    lowest[i] = searches ? m[i] * pow(m[i] / (2.0 * k * side.ceiling), alpha) : 0.0;
    x[i] = fmax(start * m[i], 1.01 * lowest[i]);
  });

  double last_change = 1.0;
  const int most = alpha < 0.1 ? kMaxNewtonOfHighPowers : kMaxNewton;
  for (int iteration = 0; iteration < most; ++iteration) {
    multiply(team, k, C, k, x, Cx);
    each(team, k, [&](int i) {
      const double free_pull = side.free_pull(m[i], x[i]), barrier = side.barrier(x[i]);
      step[i] = free_pull * (1.0 - barrier) - Cx[i];
      curve[i] = free_pull / x[i] * side.bend(barrier);
      for (int j = i; j < k; ++j) H[i * k + j] = C[i * k + j];
      H[i * k + i] += curve[i];
    });
    // C has no negative eigenvalue, so a pivot below the diagonal that was added to it is rounding
    cholesky(team, k, H, [&](int i) { return fmax(curve[i], DBL_EPSILON); });
    each(team, k, [&](int i) { direction[i] = step[i]; });
    cholesky_solve(team, k, H, step);
    double change = 0.0;
    for (int i = 0; i < k; ++i) change = fmax(change, fabs(step[i]) / x[i]);
    double length = 1.0;
    if (searches && change > 0.1) {
      const double slope = -team.sum(k, [&](int i) { return direction[i] * step[i]; });
      length = step_length(team, side, k, C, m, x, Cx, step, lowest, slope);
      change *= length;
    }
    team.sync();
    each(team, k, [&](int i) {  // small steps are plain: exp bends them out of the null space of C, where x may be large
      const double part = step[i] / x[i];
      const double next = searches || fabs(part) < 0.1 ? x[i] + length * step[i] : x[i] * exp(fmax(-2.0, fmin(2.0, part)));
      x[i] = fmin(next, 10.0 * side.ceiling);
    });
    if (change < 1e-8 || (change < 1e-4 && change > 0.5 * last_change)) break;  // quadratic: the next step would be rounding
    last_change = change;
  }
  each(team, k, [&](int i) { p.w[i] = x[i] / norm[i]; });
}

}  // namespace bargaining

// Nash-MTL (Navon et al., "Multi-task learning as a bargaining game", ICML 2022). params: the largest norm of the direction, 0 for none.
template <>
struct Rule<11> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "NashMTL";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    bargaining::solve(team, p, 1.0);
    double factor = 1.0 / sqrt(p.scale);
    if (p.params[0] > 0.0) {  // |d|^2 = w'Gw does not depend on the scale of G
      const double square = quadratic_form(team, k, p.G, p.w);
      factor *= fmin(1.0, p.params[0] / sqrt(fmax(square, DBL_MIN)));
    }
    team.sync();
    each(team, k, [&](int i) { p.w[i] *= factor; });
  }
};

// FairGrad (Ban and Ji, "Fair resource allocation in multi-task learning", ICML 2024). params: alpha; 0 is the mean.
template <>
struct Rule<12> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "FairGrad";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const double alpha = p.params[0];
    if (alpha == 0.0) return each(team, p.k, [&](int i) { p.w[i] = 1.0 / p.k; });
    bargaining::solve(team, p, alpha);
    const double factor = pow(p.scale, -alpha / (1.0 + alpha));
    each(team, p.k, [&](int i) { p.w[i] *= factor; });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
