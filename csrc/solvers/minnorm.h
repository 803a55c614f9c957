// Rules that look for the shortest vector of the gradients' hull: MGDA and CAGrad, both by one active-set method.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace minnorm {

constexpr double kEps = 2.220446049250313e-16;
// A squared length below this part of its summands' is what rounding left over: its direction means nothing.
constexpr double kCancelled = 1e-14;

// Minimises b'w + kappa sqrt(w'Gw) over the simplex, or 1/2 w'Gw + b'w over w >= 0 (cone).
//
// S holds the rows that may have weight. Wolfe's scheme (Wolfe, "Finding the nearest point in a polytope", 1976): go towards the
// minimiser of the affine hull of S; drop the row whose weight first reaches zero, else take in the row that violates the optimality
// conditions most. Each round lowers the objective, so no S comes twice.
// A is the Cholesky factor L of G[S, S] + lift: A[i, j] = A[j, i] = L[i, j], so that every inner loop reads one row.
// On the simplex w'(G + lift)w = w'Gw + lift; the lift makes the matrix definite when 0 lies in the hull, and as it is at most
// the smallest G_ii it costs no digit of any entry.
template <class Team>
struct ActiveSet {
  const Team& team;
  const int k;
  const double* G;
  double kappa = 1.0;
  const double* b = nullptr;  // null is zero
  bool cone = false;
  double lift = 0.0;
  bool prune = false;  // whether a row that depends on those before it in S is cut off (y = 0), or S keeps it with the least pivot
  double mean_norm = 0.0;  // sum of |g_i| / k where b counts

  double *A, *inverse, *one, *linear, *row, *y, *Gw, *norm, *w;
  int *S, *role;     // role: 1 in S, 0 outside, -1 barred
  int s = 0;
  double length2 = 0.0;  // w'Gw
  double reach = 0.0;    // sum of w_i |g_i|

  MMFAST_HD ActiveSet(const Team& t, const Problem& p, double* weights) : team(t), k(p.k), G(p.G), w(weights) {
    double* next = p.work;
    auto take = [&](long n) {
      double* block = next;
      next += n;
      return block;
    };
    A = take(static_cast<long>(k) * k);
    inverse = take(k), one = take(k), linear = take(k), row = take(k), y = take(k), Gw = take(k), norm = take(k);
    S = p.iwork;
    role = S + k;
    each(team, k, [&](int i) { norm[i] = sqrt(G[i * k + i]); });
    lift = G[0];
    for (int i = 1; i < k; ++i) lift = fmin(lift, G[i * k + i]);
  }
  MMFAST_HD static long taken(int k) { return static_cast<long>(k) * k + 7L * k; }

  // Rows first..s-1 of L, and of L^-1 1 and L^-1 b.
  MMFAST_APART void factor(int first) {
    const double least = 4.0 * kEps;  // a smaller pivot, relative to the diagonal, is rounding noise
    for (int i = first; i < s; ++i) {
      const double* Gi = G + static_cast<long>(S[i]) * k;
      each(team, i, [&](int j) { row[j] = Gi[S[j]] + lift; });
      const double diagonal = Gi[S[i]] + lift;
      double pivot = diagonal, ones = 1.0, linears = b ? b[S[i]] : 0.0;
      for (int m = 0; m < i; ++m) {
        const double l = row[m] * inverse[m];
        const double* Am = A + static_cast<long>(m) * k;
        pivot -= l * l;
        ones -= l * one[m];
        linears -= l * linear[m];
        if (team.rank() == 0) A[static_cast<long>(i) * k + m] = A[static_cast<long>(m) * k + i] = l;
        each(team, i - m - 1, [&](int j) { row[m + 1 + j] -= l * Am[m + 1 + j]; });
      }
      const double scale = prune && pivot < least * diagonal ? 0.0 : 1.0 / sqrt(fmax(pivot, least * diagonal));
      if (team.rank() == 0) {
        inverse[i] = scale;
        one[i] = ones * scale;
        linear[i] = linears * scale;
      }
      team.sync();
    }
  }

  // y <- the minimiser over the affine hull of S (cone: over its span); or a direction along which the objective falls for ever, and true.
  MMFAST_APART bool target() {
    double alpha = 0.0, beta = 0.0, delta = 0.0;
    for (int m = 0; m < s; ++m) {
      alpha += one[m] * one[m];
      beta += one[m] * linear[m];
    }
    // w = p - tau q: p the shortest vector of the hull, q the mean gradient projected on the hull's directions, delta = |q|^2
    double from_one = 1.0 / alpha, from_linear = 0.0;
    bool ray = false;
    if (cone) {
      from_one = 0.0;
      from_linear = -1.0;
    } else if (b) {
      for (int m = 0; m < s; ++m) {
        const double q = linear[m] - beta / alpha * one[m];
        delta += q * q;
      }
      ray = s > 1 && delta >= kappa * kappa;
      const double tau = ray ? 1.0 : sqrt(fmax(1.0 / alpha - lift, 0.0) / (kappa * kappa - delta));
      from_one = (ray ? 0.0 : 1.0 / alpha) + tau * beta / alpha;
      from_linear = -tau;
    }
    each(team, s, [&](int m) { row[m] = from_one * one[m] + from_linear * linear[m]; });
    for (int m = s - 1; m >= 0; --m) {
      const double value = row[m] * inverse[m];
      const double* Am = A + static_cast<long>(m) * k;
      if (team.rank() == 0) y[m] = value;
      each(team, m, [&](int j) { row[j] -= value * Am[j]; });
    }
    team.sync();
    return ray;
  }

  // Leaves out the rows of S without weight.
  MMFAST_APART void drop() {
    int kept = 0, first = s;
    for (int a = 0; a < s; ++a) {
      if (w[S[a]] > 0.0) ++kept;
      else if (first == s) first = a;
    }
    team.sync();
    if (team.rank() == 0) {
      int n = first;
      for (int a = first; a < s; ++a) {
        if (w[S[a]] > 0.0) S[n++] = S[a];
        else role[S[a]] = 0;
      }
    }
    team.sync();
    s = kept;
    factor(first);
  }

  // Gw, w'Gw and reach.
  MMFAST_APART void look() {
    each(team, k, [&](int i) { Gw[i] = 0.0; });
    length2 = reach = 0.0;
    for (int a = 0; a < s; ++a) {
      const double* Ga = G + static_cast<long>(S[a]) * k;
      const double wa = w[S[a]];
      reach += wa * norm[S[a]];
      each(team, k, [&](int i) { Gw[i] += wa * Ga[i]; });
    }
    for (int a = 0; a < s; ++a) length2 += w[S[a]] * Gw[S[a]];
    length2 = fmax(length2, 0.0);
  }

  // The row outside S that violates its condition most, for its length; -1 when none does beyond rounding.
  MMFAST_HD int worst() {
    // conditions of the simplex, times |g_w| so that they hold on to meaning where it vanishes
    const double weight_b = cone ? 1.0 : sqrt(length2), weight_g = cone ? 1.0 : kappa;
    double level = 0.0;
    if (!cone)
      for (int a = 0; a < s; ++a) level += w[S[a]] * (weight_g * Gw[S[a]] + (b ? weight_b * b[S[a]] : 0.0));
    const double size = weight_b * mean_norm + weight_g * reach;
    const double tolerance = 4.0 * (k + 8) * kEps * size, of_level = cone ? 0.0 : 8.0 * kEps * size * reach;
    double most = 0.0;
    int at = -1;
    for (int i = 0; i < k; ++i) {
      const double lack = level - weight_g * Gw[i] - (b ? weight_b * b[i] : 0.0);
      if (role[i] == 0 && lack > tolerance * norm[i] + of_level && lack > most * norm[i]) {
        most = lack / norm[i];
        at = i;
      }
    }
    return at;
  }

  // Starts from all rows and leaves out at once all whose weight would be negative, a few times: most problems end here.
  MMFAST_APART void start_with_all() {
    s = k;
    prune = true;
    each(team, k, [&](int i) { S[i] = i; });
    each(team, k, [&](int i) { role[i] = 1; });
    factor(0);
    for (int round = 0; round < 6; ++round) {
      const bool ray = target();
      double total = 0.0;
      bool inside = !ray;
      for (int a = 0; a < s; ++a) {
        total += fmax(y[a], 0.0);
        inside = inside && y[a] > 0.0;
      }
      each(team, k, [&](int i) { w[i] = 0.0; });
      each(team, s, [&](int a) { w[S[a]] = fmax(y[a], 0.0) / total; });
      if (inside) break;
      drop();
    }
    prune = false;
  }

  // Starts from the weights in w.
  MMFAST_HD void start_with_weights() {
    s = 0;
    for (int i = 0; i < k; ++i) s += w[i] > 0.0;
    if (team.rank() == 0)
      for (int i = 0, n = 0; i < k; ++i) {
        role[i] = w[i] > 0.0;
        if (role[i]) S[n++] = i;
      }
    team.sync();
    factor(0);
  }

  MMFAST_APART void descend() {
    int entered = -1;
    for (int round = 0; round < 16 * k + 64; ++round) {
      const bool ray = target();
      double step = 1.0;
      int blocking = -1;
      for (int a = 0; a < s; ++a) {
        const double fall = ray ? -y[a] : w[S[a]] - y[a];
        if (ray ? fall > 0.0 : y[a] <= 0.0) {
          const double until = fall > 0.0 ? w[S[a]] / fall : 0.0;
          if (blocking < 0 || until < step) {
            step = until;
            blocking = a;
          }
        }
      }
      team.sync();
      if (blocking >= 0) {
        const int out = S[blocking];
        const bool barred = out == entered && step == 0.0;  // it came in by rounding alone
        each(team, s, [&](int a) {
          double& value = w[S[a]];
          value = a == blocking ? 0.0 : fmax(value + step * (ray ? y[a] : y[a] - value), 0.0);
        });
        drop();
        if (barred && team.rank() == 0) role[out] = -1;
        team.sync();
        continue;
      }
      if (!ray) each(team, s, [&](int a) { w[S[a]] = y[a]; });
      look();
      entered = worst();
      team.sync();
      if (entered < 0 || ray) return;
      if (team.rank() == 0) {
        S[s] = entered;
        role[entered] = 1;
        w[entered] = 0.0;
      }
      ++s;
      team.sync();
      factor(s - 1);
    }
    look();
  }

  // Rows that no entry of G tells apart share their weight, so that copies are treated alike.
  MMFAST_HD void share() {
    each(team, k, [&](int i) { role[i] = 0; });
    for (int i = 0; i < k; ++i) {
      if (role[i]) continue;
      int copies = 1;
      double total = w[i];
      for (int j = i + 1; j < k; ++j)
        if (!role[j] && alike(i, j)) {
          ++copies;
          total += w[j];
        }
      if (copies == 1) continue;
      team.sync();
      if (team.rank() == 0) {
        for (int j = i + 1; j < k; ++j)
          if (!role[j] && alike(i, j)) {
            role[j] = 1;
            w[j] = total / copies;
          }
        w[i] = total / copies;
      }
      team.sync();
    }
    team.sync();
  }

  MMFAST_HD bool alike(int i, int j) const {
    const double* Gi = G + static_cast<long>(i) * k;
    const double* Gj = G + static_cast<long>(j) * k;
    const double rounding = 4.0 * kEps * norm[i];
    if (fabs(Gi[i] - Gj[i]) > rounding * norm[i]) return false;
    for (int l = 0; l < k; ++l)
      if (fabs(Gi[l] - Gj[l]) > rounding * norm[l]) return false;
    return true;
  }
};

}  // namespace minnorm

// MGDA (Sener & Koltun, "Multi-task learning as multi-objective optimization", 2018): the shortest vector of the hull.
template <>
struct Rule<6> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "MGDA";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const bool unit = p.params[0] != 0.0;
    const int k = p.k;
    Problem q = p;
    if (unit) {  // on the cosines
      double* C = p.work + minnorm::ActiveSet<Team>::taken(k);
      each(team, k * k, [&](int e) {
        C[e] = e / k == e % k ? 1.0 : p.G[e] / (sqrt(p.G[e / k * k + e / k]) * sqrt(p.G[e % k * k + e % k]));
      });
      q.G = C;
    }
    minnorm::ActiveSet<Team> set(team, q, p.w);
    set.start_with_all();
    set.descend();
    set.share();
    if (unit) each(team, k, [&](int i) { p.w[i] /= sqrt(p.G[i * k + i]) * sqrt(p.scale); });
  }
};

// CAGrad (Liu et al., "Conflict-averse gradient descent", 2021): the best worst case within c |g0| of the mean gradient g0.
template <>
struct Rule<7> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "CAGrad";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    using minnorm::kCancelled;
    const int k = p.k;
    const double c = p.params[0];
    const double shrink = p.params[1] == 1.0 ? 1.0 / (1.0 + c * c) : p.params[1] == 2.0 ? 1.0 / (1.0 + c) : 1.0;
    double* b = p.work + minnorm::ActiveSet<Team>::taken(k);
    minnorm::ActiveSet<Team> set(team, p, p.w);
    each(team, k, [&](int i) { b[i] = 0.0; });
    for (int j = 0; j < k; ++j) each(team, k, [&](int i) { b[i] += p.G[j * k + i] / k; });
    const double mean_norm = team.sum(k, [&](int i) { return set.norm[i]; }) / k;
    const double mean2 = team.sum(k, [&](int i) { return b[i]; }) / k;
    double factor = 0.0;
    each(team, k, [&](int i) { p.w[i] = 0.0; });
    if (c > 0.0 && mean2 > kCancelled * mean_norm * mean_norm) {
      set.b = b;
      set.kappa = c * sqrt(mean2);
      set.mean_norm = mean_norm;
      set.start_with_all();
      set.descend();
      if (set.length2 <= kCancelled * set.reach * set.reach) nearest(team, set);
      set.share();
      if (set.cone) factor = fmin(set.kappa / sqrt(set.length2), 1.0);
      else factor = set.kappa / sqrt(fmax(set.length2, kCancelled * set.reach * set.reach));
    }
    each(team, k, [&](int i) { p.w[i] = shrink * (1.0 / k + factor * p.w[i]); });
  }

 private:
  // The hull holds zero: no direction helps all rows. If the ball around g0 holds one that harms none, the nearest to g0 of these
  // (cone stays set); else the shortest vector was a saddle of the search, and it starts again below it.
  template <class Team>
  MMFAST_HD static void nearest(const Team& team, minnorm::ActiveSet<Team>& set) {
    const double lift = set.lift;
    set.cone = true;
    set.lift = 0.0;
    each(team, set.k, [&](int i) { set.w[i] = 0.0; });
    set.start_with_weights();
    set.descend();
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
