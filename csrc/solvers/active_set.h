// The shortest vector of the gradients' hull, or the nearest to a given one, by an active-set method: what the rules of minnorm.h are solved by.
#pragma once

#include <cfloat>

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace minnorm {

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

  double *A, *inverse, *Linv_one, *Linv_b, *row, *y, *Gw, *norm, *w;
  int *S, *status;   // status: 1 in S, 0 outside, -1 barred
  int s = 0;
  double length2 = 0.0;     // w'Gw
  double norm_bound = 0.0;  // sum of w_i |g_i|

  MMFAST_HD ActiveSet(const Team& t, const Problem& p, double* weights) : team(t), k(p.k), G(p.G), w(weights) {
    double* next = p.work;
    auto take = [&](long n) {
      double* block = next;
      next += n;
      return block;
    };
    A = take(static_cast<long>(k) * k);
    inverse = take(k), Linv_one = take(k), Linv_b = take(k), row = take(k), y = take(k), Gw = take(k), norm = take(k);
    S = p.iwork;
    status = S + k;
    each(team, k, [&](int i) { norm[i] = sqrt(G[i * k + i]); });
    lift = G[0];
    for (int i = 1; i < k; ++i) lift = fmin(lift, G[i * k + i]);
  }
  // Doubles of Problem::work that it takes.
  MMFAST_HD static long work_size(int k) { return static_cast<long>(k) * k + 7L * k; }

  // Rows first..s-1 of L, and of L^-1 1 and L^-1 b.
  MMFAST_APART void factor(int first) {
    const double min_pivot = 4.0 * DBL_EPSILON;  // a smaller one, relative to the diagonal, is rounding noise
    for (int i = first; i < s; ++i) {
      const double* Gi = G + static_cast<long>(S[i]) * k;
      each(team, i, [&](int j) { row[j] = Gi[S[j]] + lift; });
      const double diagonal = Gi[S[i]] + lift;
      double pivot = diagonal, one_i = 1.0, b_i = b ? b[S[i]] : 0.0;
      for (int m = 0; m < i; ++m) {
        const double l = row[m] * inverse[m];
        const double* Am = A + static_cast<long>(m) * k;
        pivot -= l * l;
        one_i -= l * Linv_one[m];
        b_i -= l * Linv_b[m];
        if (team.rank() == 0) A[static_cast<long>(i) * k + m] = A[static_cast<long>(m) * k + i] = l;
        each(team, i - m - 1, [&](int j) { row[m + 1 + j] -= l * Am[m + 1 + j]; });
      }
      const double scale = prune && pivot < min_pivot * diagonal ? 0.0 : 1.0 / sqrt(fmax(pivot, min_pivot * diagonal));
      if (team.rank() == 0) {
        inverse[i] = scale;
        Linv_one[i] = one_i * scale;
        Linv_b[i] = b_i * scale;
      }
      team.sync();
    }
  }

  // y <- the minimiser over the affine hull of S (cone: over its span); or a direction along which the objective falls for ever, and true.
  MMFAST_APART bool affine_minimiser() {
    double alpha = 0.0, beta = 0.0, delta = 0.0;
    for (int m = 0; m < s; ++m) {
      alpha += Linv_one[m] * Linv_one[m];
      beta += Linv_one[m] * Linv_b[m];
    }
    // w = p - tau q: p the shortest vector of the hull, q the mean gradient projected on the hull's directions, delta = |q|^2
    double of_one = 1.0 / alpha, of_b = 0.0;
    bool ray = false;
    if (cone) {
      of_one = 0.0;
      of_b = -1.0;
    } else if (b) {
      for (int m = 0; m < s; ++m) {
        const double q = Linv_b[m] - beta / alpha * Linv_one[m];
        delta += q * q;
      }
      ray = s > 1 && delta >= kappa * kappa;
      const double tau = ray ? 1.0 : sqrt(fmax(1.0 / alpha - lift, 0.0) / (kappa * kappa - delta));
      of_one = (ray ? 0.0 : 1.0 / alpha) + tau * beta / alpha;
      of_b = -tau;
    }
    each(team, s, [&](int m) { row[m] = of_one * Linv_one[m] + of_b * Linv_b[m]; });
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
  MMFAST_APART void drop_rows() {
    int remaining = 0, first = s;
    for (int a = 0; a < s; ++a) {
      if (w[S[a]] > 0.0) ++remaining;
      else if (first == s) first = a;
    }
    team.sync();
    if (team.rank() == 0) {
      int n = first;
      for (int a = first; a < s; ++a) {
        if (w[S[a]] > 0.0) S[n++] = S[a];
        else status[S[a]] = 0;
      }
    }
    team.sync();
    s = remaining;
    factor(first);
  }

  // Gw, w'Gw and norm_bound.
  MMFAST_APART void evaluate() {
    each(team, k, [&](int i) { Gw[i] = 0.0; });
    length2 = norm_bound = 0.0;
    for (int a = 0; a < s; ++a) {
      const double* Ga = G + static_cast<long>(S[a]) * k;
      const double wa = w[S[a]];
      norm_bound += wa * norm[S[a]];
      each(team, k, [&](int i) { Gw[i] += wa * Ga[i]; });
    }
    for (int a = 0; a < s; ++a) length2 += w[S[a]] * Gw[S[a]];
    length2 = fmax(length2, 0.0);
  }

  // The row outside S that violates its condition most, for its length; -1 when none does beyond rounding.
  MMFAST_HD int most_violating() {
    // conditions of the simplex, times |g_w| so that they hold on to meaning where it vanishes
    const double weight_b = cone ? 1.0 : sqrt(length2), weight_g = cone ? 1.0 : kappa;
    double level = 0.0;
    if (!cone)
      for (int a = 0; a < s; ++a) level += w[S[a]] * (weight_g * Gw[S[a]] + (b ? weight_b * b[S[a]] : 0.0));
    const double size = weight_b * mean_norm + weight_g * norm_bound;
    const double tolerance = 4.0 * (k + 8) * DBL_EPSILON * size, of_level = cone ? 0.0 : 8.0 * DBL_EPSILON * size * norm_bound;
    double worst = 0.0;
    int worst_row = -1;
    for (int i = 0; i < k; ++i) {
      const double violation = level - weight_g * Gw[i] - (b ? weight_b * b[i] : 0.0);
      if (status[i] == 0 && violation > tolerance * norm[i] + of_level && violation > worst * norm[i]) {
        worst = violation / norm[i];
        worst_row = i;
      }
    }
    return worst_row;
  }

  // Starts from all rows and leaves out at once all whose weight would be negative, a few times: most problems end here.
  MMFAST_APART void start_with_all() {
    s = k;
    prune = true;
    each(team, k, [&](int i) { S[i] = i; });
    each(team, k, [&](int i) { status[i] = 1; });
    factor(0);
    for (int round = 0; round < 6; ++round) {
      const bool ray = affine_minimiser();
      double total = 0.0;
      bool inside = !ray;
      for (int a = 0; a < s; ++a) {
        total += fmax(y[a], 0.0);
        inside = inside && y[a] > 0.0;
      }
      each(team, k, [&](int i) { w[i] = 0.0; });
      each(team, s, [&](int a) { w[S[a]] = fmax(y[a], 0.0) / total; });
      if (inside) break;
      drop_rows();
    }
    prune = false;
  }

  // Starts from the weights in w.
  MMFAST_HD void start_with_weights() {
    s = 0;
    for (int i = 0; i < k; ++i) s += w[i] > 0.0;
    if (team.rank() == 0)
      for (int i = 0, n = 0; i < k; ++i) {
        status[i] = w[i] > 0.0;
        if (status[i]) S[n++] = i;
      }
    team.sync();
    factor(0);
  }

  MMFAST_APART void descend() {
    int entered = -1;
    for (int round = 0; round < 16 * k + 64; ++round) {
      const bool ray = affine_minimiser();
      double step = 1.0;
      int blocking = -1;
      for (int a = 0; a < s; ++a) {
        const double decrease = ray ? -y[a] : w[S[a]] - y[a];
        if (ray ? decrease > 0.0 : y[a] <= 0.0) {
          const double max_step = decrease > 0.0 ? w[S[a]] / decrease : 0.0;
          if (blocking < 0 || max_step < step) {
            step = max_step;
            blocking = a;
          }
        }
      }
      team.sync();
      if (blocking >= 0) {
        const int leaving = S[blocking];
        const bool barred = leaving == entered && step == 0.0;  // it came in by rounding alone
        each(team, s, [&](int a) {
          double& value = w[S[a]];
          value = a == blocking ? 0.0 : fmax(value + step * (ray ? y[a] : y[a] - value), 0.0);
        });
        drop_rows();
        if (barred && team.rank() == 0) status[leaving] = -1;
        team.sync();
        continue;
      }
      if (!ray) each(team, s, [&](int a) { w[S[a]] = y[a]; });
      evaluate();
      // with a mean gradient, a hull that holds zero is the caller's to judge; what would enter now enters by rounding
      if (b && !cone && length2 <= kCancelled * norm_bound * norm_bound) return;
      entered = most_violating();
      team.sync();
      if (entered < 0 || ray) return;
      if (team.rank() == 0) {
        S[s] = entered;
        status[entered] = 1;
        w[entered] = 0.0;
      }
      ++s;
      team.sync();
      factor(s - 1);
    }
    evaluate();
  }

  // Rows that no entry of G tells apart share their weight, so that copies are treated alike.
  MMFAST_HD void share_among_copies() {
    each(team, k, [&](int i) { status[i] = 0; });
    for (int i = 0; i < k; ++i) {
      if (status[i]) continue;
      int copies = 1;
      double total = w[i];
      for (int j = i + 1; j < k; ++j)
        if (!status[j] && same_entries(i, j)) {
          ++copies;
          total += w[j];
        }
      if (copies == 1) continue;
      team.sync();
      if (team.rank() == 0) {
        for (int j = i + 1; j < k; ++j)
          if (!status[j] && same_entries(i, j)) {
            status[j] = 1;
            w[j] = total / copies;
          }
        w[i] = total / copies;
      }
      team.sync();
    }
    team.sync();
  }

  MMFAST_HD bool same_entries(int i, int j) const {
    const double* Gi = G + static_cast<long>(i) * k;
    const double* Gj = G + static_cast<long>(j) * k;
    const double rounding = 4.0 * DBL_EPSILON * norm[i];
    if (fabs(Gi[i] - Gj[i]) > rounding * norm[i]) return false;
    for (int l = 0; l < k; ++l)
      if (fabs(Gi[l] - Gj[l]) > rounding * norm[l]) return false;
    return true;
  }
};

}  // namespace minnorm

}  // namespace MMFAST_ISA
}  // namespace mmfast
