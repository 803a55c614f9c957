// min 1/2 l'Cl + q'l over l >= 0, for a positive semidefinite C with a unit diagonal: exact, in finitely many steps.
//
// A few projected Gauss-Seidel sweeps guess which l are positive; the dual active-set method of Goldfarb and Idnani (1983)
// goes on from that guess, one constraint at a time, on a Cholesky factor that grows and shrinks with the set.
#pragma once

#include "team.h"

namespace mmfast {
namespace MMFAST_ISA {

// y -= a[0] x0 + a[1] x1 + a[2] x2 + a[3] x3, one row after the other: four at a time, so that y is read and written once for all
template <class Team>
MMFAST_HD inline void subtract_rows(const Team& team, int n, double* __restrict__ y, const double* a, const double* __restrict__ x0,
                                    const double* __restrict__ x1, const double* __restrict__ x2, const double* __restrict__ x3) {
  const double a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  for (int i = team.rank(); i < n; i += team.size()) y[i] = y[i] - a0 * x0[i] - a1 * x1[i] - a2 * x2[i] - a3 * x3[i];
  team.sync();
}

template <class Team>
struct NonNegative {
  // A pivot is the square norm of a sum of unit vectors: its rounding error is this times the square of the sum of their weights.
  static constexpr double kRounding = 1e-15;
  static constexpr double kSafePivot = 1e-10;  // a guess takes only rows clearly independent of those before
  static constexpr double kSlack = 1e-13;  // a slack counts as violated beyond this share of the sums it is made of
  static constexpr double kDependentSlack = 1e-10;  // for a row dependent on the set: near-opposite members amplify its rounding
  static constexpr double kHidden = 4e-8;  // times its weights, where it cannot contradict the set: a pivot of rounding hides sqrt(kRounding) of its length
  static constexpr double kZero = 1e-12;  // a weight below this share of all is rounding and never reaches a bound
  static constexpr int kSweeps = 4;
  enum Status { kFree = 0, kInSet = 1, kRejected = 2 };

  const Team& team;
  int k;
  const double* C;  // [k, k]
  double* q;        // [k] to be filled before solve()
  double* slack;    // [k] C l + q
  double* x;        // [k] out: the solution
  double* U;        // [k, k] upper Cholesky factor of C on the set
  double* L;        // [k, k] its transpose, so that both substitutions run along rows
  double *inverse, *b, *l, *y, *z;  // [k], by position in the set: 1 / diagonal, U'^-1 (-q), multipliers, two scratch vectors
  int *set, *status;                // [k] its rows; a Status of each row
  int set_size;

  // work has 2 k^2 + 8 k numbers, iwork 2 k
  MMFAST_HD NonNegative(const Team& team, int k, const double* C, double* work, int* iwork) : team(team), k(k), C(C), set_size(0) {
    U = work;
    L = U + static_cast<long>(k) * k;
    q = L + static_cast<long>(k) * k;
    slack = q + k;
    x = slack + k;
    inverse = x + k;
    b = inverse + k;
    l = b + k;
    y = l + k;
    z = y + k;
    set = iwork;
    status = set + k;
  }

  // Next column of the factor, as if row j joined the set; returns its pivot, the squared distance of row j to the set's span.
  MMFAST_APART double column(int j, double* right) {
    const double* row = C + static_cast<long>(j) * k;
    each(team, set_size, [&](int c) { y[c] = row[set[c]]; });
    double pivot = row[j], rhs = -q[j];
    for (int c = 0; c < set_size; c += 4) {
      double t[4] = {0.0, 0.0, 0.0, 0.0};
      for (int e = 0; e < 4 && c + e < set_size; ++e) {
        double v = y[c + e];
        for (int f = 0; f < e; ++f) v -= t[f] * L[(c + e) * k + c + f];
        t[e] = v * inverse[c + e];
        if (team.rank() == 0) L[set_size * k + c + e] = U[(c + e) * k + set_size] = t[e];
        pivot -= t[e] * t[e];
        rhs -= t[e] * b[c + e];
      }
      const double* rows = U + c * k + c + 4;
      if (c + 4 < set_size) subtract_rows(team, set_size - c - 4, y + c + 4, t, rows, rows + k, rows + 2 * k, rows + 3 * k);
    }
    team.sync();
    *right = rhs;
    return pivot;
  }

  MMFAST_HD void add_row(int j, double pivot, double rhs) {
    if (team.rank() == 0) {
      inverse[set_size] = 1.0 / sqrt(pivot);
      b[set_size] = rhs * inverse[set_size];
      set[set_size] = j;
      status[j] = kInSet;
    }
    ++set_size;
    team.sync();
  }

  // Keeps the members c with keep(c), in their order; the factor before the first that leaves stays.
  template <class Keep>
  MMFAST_HD void filter(Keep keep) {
    const int old_size = set_size;
    set_size = 0;
    while (set_size < old_size && keep(set_size)) ++set_size;
    for (int c = set_size; c < old_size; ++c) {
      const int j = set[c];
      if (keep(c)) {
        double rhs;
        const double pivot = column(j, &rhs);
        add_row(j, fmax(pivot, kRounding), rhs);  // fewer rows before it: its pivot can shrink by rounding alone
      } else {
        if (team.rank() == 0) status[j] = kFree;
        team.sync();
      }
    }
  }

  // z <- U^-1 y
  MMFAST_APART void substitute() {
    for (int end = set_size; end > 0; end -= 4) {
      const int begin = end > 4 ? end - 4 : 0;
      double t[4] = {0.0, 0.0, 0.0, 0.0};
      for (int e = end - 1; e >= begin; --e) {
        double v = y[e];
        for (int f = e + 1; f < end; ++f) v -= L[f * k + e] * t[f - begin];
        t[e - begin] = v * inverse[e];
        if (team.rank() == 0) z[e] = t[e - begin];
      }
      const double* rows = L + begin * k;
      if (begin > 0) subtract_rows(team, begin, y, t, rows, rows + k, rows + 2 * k, rows + 3 * k);
    }
    team.sync();
  }

  // z <- the minimiser over the set, its signs free; returns how many are not positive
  MMFAST_HD int minimise() {
    each(team, set_size, [&](int c) { y[c] = b[c]; });
    substitute();
    int bad = 0;
    for (int c = 0; c < set_size; ++c) bad += !(z[c] > 0.0);
    return bad;
  }

  MMFAST_APART void compute_slacks() {
    each(team, k, [&](int i) { slack[i] = q[i]; });
    for (int c = 0; c < set_size; c += 4) {
      double t[4] = {0.0, 0.0, 0.0, 0.0};
      const double* rows[4];
      for (int e = 0; e < 4; ++e) {
        rows[e] = C + static_cast<long>(set[c + e < set_size ? c + e : c]) * k;
        if (c + e < set_size) t[e] = -l[c + e];
      }
      subtract_rows(team, k, slack, t, rows[0], rows[1], rows[2], rows[3]);
    }
  }

  // The set that projected Gauss-Seidel finds, without dependent members and without those that turn out not to be positive.
  MMFAST_APART void guess() {
    each(team, k, [&](int i) {
      slack[i] = q[i];
      x[i] = 0.0;
      status[i] = kFree;
    });
    set_size = 0;
    for (int sweep = 0; sweep < kSweeps; ++sweep)
      for (int j = 0; j < k; ++j) {
        const double step = fmax(-slack[j], -x[j]);
        if (step == 0.0) continue;
        team.sync();
        const double* row = C + static_cast<long>(j) * k;
        for (int i = team.rank(); i < k; i += team.size()) slack[i] += step * row[i];
        if (team.rank() == 0) x[j] += step;
        team.sync();
      }
    for (int j = 0; j < k; ++j) {
      if (!(x[j] > 0.0)) continue;
      double rhs;
      const double pivot = column(j, &rhs);
      if (pivot > kSafePivot) add_row(j, pivot, rhs);
    }
    settle();
  }

  // The minimiser over the set, without those that turn out not to be positive.
  MMFAST_APART void settle() {
    while (minimise() > 0) filter([&](int c) { return z[c] > 0.0; });
    each(team, set_size, [&](int c) { l[c] = z[c]; });
  }

  // Fills x; q_scale is the size of the sums that q is made of. False when the minimum is -infinity; a caller whose q lies in
  // the range of C knows that it is not and says so: then a row that would prove it is rounding noise and is left alone.
  MMFAST_APART bool solve(double q_scale, bool in_range) {
    guess();
    bool bounded = true;
    for (int steps = 0; bounded && steps < 4 * k + 16;) {
      compute_slacks();
      double scale = q_scale;
      for (int c = 0; c < set_size; ++c) scale += l[c];
      int j = -1;
      for (int i = 0; i < k; ++i)
        if (status[i] == kFree && slack[i] < -kSlack * scale && (j < 0 || slack[i] < slack[j])) j = i;
      if (j < 0) break;
      double multiplier = 0.0, slack_j = slack[j];
      for (;; ++steps) {  // raise the multiplier of j; members whose own reaches zero leave
        double rhs;
        const double pivot = column(j, &rhs);
        each(team, set_size, [&](int c) { y[c] = L[set_size * k + c]; });
        substitute();
        int first = -1;
        double partial = INFINITY, weights = 1.0;
        for (int c = 0; c < set_size; ++c) weights += fabs(z[c]);
        for (int c = 0; c < set_size; ++c)
          if (z[c] > kZero * weights && l[c] < partial * z[c]) {
            first = c;
            partial = l[c] / z[c];
          }
        const double full = pivot > kRounding * weights * weights ? -slack_j / pivot : INFINITY;
        const bool dependent = !(full < INFINITY);
        const bool noise = dependent && slack_j >= -(in_range ? kHidden * weights : kDependentSlack) * scale;
        if (noise || (dependent && first < 0)) {
          bounded = noise || in_range;
          if (team.rank() == 0) status[j] = kRejected;
          team.sync();
          if (multiplier > 0.0) settle();  // what the others gave way to is not there
          break;
        }
        const double step = full <= partial ? full : partial;
        team.sync();
        each(team, set_size, [&](int c) { l[c] = fmax(l[c] - step * z[c], 0.0); });
        multiplier += step;
        if (full <= partial) {
          add_row(j, pivot, rhs);
          if (team.rank() == 0) l[set_size - 1] = multiplier;
          team.sync();
          if (minimise() == 0) each(team, set_size, [&](int c) { l[c] = z[c]; });
          ++steps;
          break;
        }
        slack_j += step * pivot;
        if (team.rank() == 0)
          for (int c = first; c + 1 < set_size; ++c) l[c] = l[c + 1];
        filter([&](int c) { return c != first; });
      }
    }
    each(team, k, [&](int i) { x[i] = 0.0; });
    each(team, set_size, [&](int c) { x[set[c]] = l[c]; });
    return bounded;
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
