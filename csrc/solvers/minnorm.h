// Rules that look for the shortest vector of the gradients' hull: MGDA, MMPareto and CAGrad, all by one active-set method.
#pragma once

#include "active_set.h"
#include "linalg.h"

namespace mmfast {
namespace MMFAST_ISA {

// MGDA (Sener & Koltun, "Multi-task learning as multi-objective optimization", 2018): the shortest vector of the hull.
template <>
struct Rule<6> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "MGDA";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1 || n_params == 2; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const bool unit = p.params[0] != 0.0;
    const int k = p.k;
    double *C = p.work + minnorm::ActiveSet<Team>::work_size(k), *norm = C + k * k;
    Problem q = p;
    if (unit) {  // on the cosines
      cosines(team, k, p.G, norm, C);
      q.G = C;
    }
    minnorm::ActiveSet<Team> set(team, q, p.w);
    set.start_with_all();
    set.descend();
    set.share_among_copies();
    if (p.n_params == 2) each(team, k, [&](int i) { p.w[i] = p.w[i] > p.params[1] ? p.params[1] : p.w[i]; });
    if (unit) each(team, k, [&](int i) { p.w[i] /= norm[i] * sqrt(p.scale); });
  }
};

// MMPareto (Wei & Hu, "MMPareto: boosting multimodal learning with innocent unimodal assistance", ICML 2024): the plain sum where no two rows
// conflict, else k times the shortest vector of the hull, made as long as the sum where it is shorter; times gamma. params: gamma.
template <>
struct Rule<22> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "MMPareto";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    const double gamma = p.params[0];
    const double conflicts = team.sum(k, [&](int i) {
      double count = 0.0;
      for (int j = 0; j < i; ++j) count += p.G[static_cast<long>(i) * k + j] <= 0.0;
      return count;
    });
    if (conflicts == 0.0) {
      each(team, k, [&](int i) { p.w[i] = gamma; });
      return;
    }
    minnorm::ActiveSet<Team> set(team, p, p.w);
    set.start_with_all();
    set.descend();
    set.share_among_copies();
    const double lift = p.lift / (1.0 + p.lift);  // part of the diagonal of G that no gradient has
    auto square = [&](auto weight) {
      return team.sum(k, [&](int i) {
        double along = -lift * weight(i) * p.G[static_cast<long>(i) * k + i];
        for (int j = 0; j < k; ++j) along += p.G[static_cast<long>(i) * k + j] * weight(j);
        return weight(i) * along;
      });
    };
    const double sum2 = square([](int) { return 1.0; }), ours2 = k * k * square([&](int i) { return p.w[i]; });
    const double reach = k * team.sum(k, [&](int i) { return p.w[i] * set.norm[i]; });
    const double factor = ours2 > cancelled(p.precision) * reach * reach && ours2 < sum2 ? sqrt(sum2 / ours2) : 1.0;
    each(team, k, [&](int i) { p.w[i] *= gamma * k * factor; });
  }
};

// CAGrad (Liu et al., "Conflict-averse gradient descent", 2021): the best worst case within c |g0| of the mean gradient g0.
template <>
struct Rule<7> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool lifts = true;
  static constexpr const char* name = "CAGrad";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    const double c = p.params[0];
    const double shrink = p.params[1] == 1.0 ? 1.0 / (1.0 + c * c) : p.params[1] == 2.0 ? 1.0 / (1.0 + c) : 1.0;
    double* b = p.work + minnorm::ActiveSet<Team>::work_size(k);
    minnorm::ActiveSet<Team> set(team, p, p.w);
    each(team, k, [&](int i) { b[i] = 0.0; });
    for (int j = 0; j < k; ++j) each(team, k, [&](int i) { b[i] += p.G[j * k + i] / k; });
    const double mean_norm = team.sum(k, [&](int i) { return set.norm[i]; }) / k;
    const double lift = p.lift / (1.0 + p.lift);  // part of the diagonal of G that no gradient has
    const double mean2 = team.sum(k, [&](int i) { return b[i] / k - lift * p.G[i * k + i] / (k * k); });
    double factor = 0.0;
    each(team, k, [&](int i) { p.w[i] = 0.0; });
    if (c > 0.0 && mean2 > cancelled(p.precision) * mean_norm * mean_norm) {
      set.b = b;
      set.kappa = c * sqrt(mean2);
      set.mean_norm = mean_norm;
      set.start_with_all();
      set.descend();
      // little more than the lift is left of the shortest vector: zero, as far as the Gramian tells
      const double lifted = lift * team.sum(k, [&](int i) { return p.w[i] * p.w[i] * p.G[i * k + i]; });
      if (set.length2 <= fmax(kCancelled * set.norm_bound * set.norm_bound, 4.0 * lifted)) nearest(team, set);
      set.share_among_copies();
      if (set.cone) factor = fmin(set.kappa / sqrt(set.length2), 1.0);
      else factor = set.kappa / sqrt(fmax(set.length2, kCancelled * set.norm_bound * set.norm_bound));
    }
    each(team, k, [&](int i) { p.w[i] = shrink * (1.0 / k + factor * p.w[i]); });
  }

 private:
  // The hull holds zero: no direction helps all rows. If the ball around g0 holds one that harms none, the nearest to g0 of these
  // (cone stays set); else the shortest vector was a saddle of the search, and it starts again below it.
  template <class Team>
  MMFAST_HD static void nearest(const Team& team, minnorm::ActiveSet<Team>& set) {
    const double lift = set.lift;
    set.cone = set.prune = true;  // what depends on rows of S enters by rounding alone, and its weights have no bound
    set.lift = 0.0;
    each(team, set.k, [&](int i) { set.w[i] = 0.0; });
    set.start_with_weights();
    set.descend();
    set.prune = false;
    if (set.length2 <= set.kappa * set.kappa * (1.0 + 1e-9)) return;
    double total = 0.0;
    for (int i = 0; i < set.k; ++i) total += set.w[i];
    team.sync();
    each(team, set.k, [&](int i) { set.w[i] /= total; });
    set.cone = false;
    set.lift = lift;
    set.start_with_weights();
    set.descend();
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
