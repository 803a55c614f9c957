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
  static constexpr double kZero = 1e-12;  // a weight below this share of all is rounding and never reaches a bound
  static constexpr int kSweeps = 4;
  enum Place { kFree = 0, kInSet = 1, kRejected = 2 };

  const Team& team;
  int k;
  const double* C;  // [k, k]
  double* q;        // [k] to be filled before solve()
  double* s;        // [k] the slacks C l + q
  double* x;        // [k] out: the solution
  double* U;        // [k, k] upper Cholesky factor of C on the set
  double* L;        // [k, k] its transpose, so that both substitutions run along rows
  double *inverse, *b, *l, *y, *z;  // [k], by position in the set: 1 / diagonal, U'^-1 (-q), multipliers, two scratch vectors
  int *set, *place;                 // [k]
  int p;                            // size of the set

  // work has 2 k^2 + 8 k numbers, iwork 2 k
  MMFAST_HD NonNegative(const Team& team, int k, const double* C, double* work, int* iwork) : team(team), k(k), C(C), p(0) {
    U = work;
    L = U + static_cast<long>(k) * k;
    q = L + static_cast<long>(k) * k;
    s = q + k;
    x = s + k;
    inverse = x + k;
    b = inverse + k;
    l = b + k;
    y = l + k;
    z = y + k;
    set = iwork;
    place = set + k;
  }

  // Next column of the factor, as if row j joined the set; returns its pivot, the squared distance of row j to the set's span.
  MMFAST_APART double column(int j, double* right) {
    const double* row = C + static_cast<long>(j) * k;
    each(team, p, [&](int c) { y[c] = row[set[c]]; });
    double pivot = row[j], rhs = -q[j];
    for (int c = 0; c < p; c += 4) {
      double t[4] = {0.0, 0.0, 0.0, 0.0};
      for (int e = 0; e < 4 && c + e < p; ++e) {
        double v = y[c + e];
        for (int f = 0; f < e; ++f) v -= t[f] * L[(c + e) * k + c + f];
        t[e] = v * inverse[c + e];
        if (team.rank() == 0) L[p * k + c + e] = U[(c + e) * k + p] = t[e];
        pivot -= t[e] * t[e];
        rhs -= t[e] * b[c + e];
      }
      const double* rows = U + c * k + c + 4;
      if (c + 4 < p) subtract_rows(team, p - c - 4, y + c + 4, t, rows, rows + k, rows + 2 * k, rows + 3 * k);
    }
    team.sync();
    *right = rhs;
    return pivot;
  }

  MMFAST_HD void join(int j, double pivot, double rhs) {
    if (team.rank() == 0) {
      inverse[p] = 1.0 / sqrt(pivot);
      b[p] = rhs * inverse[p];
      set[p] = j;
      place[j] = kInSet;
    }
    ++p;
    team.sync();
  }

  // Keeps the members c with keep(c), in their order; the factor before the first that leaves stays.
  template <class Keep>
  MMFAST_HD void filter(Keep keep) {
    const int size = p;
    p = 0;
    while (p < size && keep(p)) ++p;
    for (int c = p; c < size; ++c) {
      const int j = set[c];
      if (keep(c)) {
        double rhs;
        const double pivot = column(j, &rhs);
        join(j, fmax(pivot, kRounding), rhs);  // fewer rows before it: its pivot can shrink by rounding alone
      } else {
        if (team.rank() == 0) place[j] = kFree;
        team.sync();
      }
    }
  }

  // z <- U^-1 y
  MMFAST_APART void substitute() {
    for (int end = p; end > 0; end -= 4) {
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
    each(team, p, [&](int c) { y[c] = b[c]; });
    substitute();
    int bad = 0;
    for (int c = 0; c < p; ++c) bad += !(z[c] > 0.0);
    return bad;
  }

  MMFAST_APART void slacks() {
    each(team, k, [&](int i) { s[i] = q[i]; });
    for (int c = 0; c < p; c += 4) {
      double t[4] = {0.0, 0.0, 0.0, 0.0};
      const double* rows[4];
      for (int e = 0; e < 4; ++e) {
        rows[e] = C + static_cast<long>(set[c + e < p ? c + e : c]) * k;
        if (c + e < p) t[e] = -l[c + e];
      }
      subtract_rows(team, k, s, t, rows[0], rows[1], rows[2], rows[3]);
    }
  }

  // The set that projected Gauss-Seidel finds, without dependent members and without those that turn out not to be positive.
  MMFAST_APART void guess() {
    each(team, k, [&](int i) {
      s[i] = q[i];
      x[i] = 0.0;
      place[i] = kFree;
    });
    p = 0;
    for (int sweep = 0; sweep < kSweeps; ++sweep)
      for (int j = 0; j < k; ++j) {
        const double step = fmax(-s[j], -x[j]);
        if (step == 0.0) continue;
        team.sync();
        const double* row = C + static_cast<long>(j) * k;
        for (int i = team.rank(); i < k; i += team.size()) s[i] += step * row[i];
        if (team.rank() == 0) x[j] += step;
        team.sync();
      }
    for (int j = 0; j < k; ++j) {
      if (!(x[j] > 0.0)) continue;
      double rhs;
      const double pivot = column(j, &rhs);
      if (pivot > kSafePivot) join(j, pivot, rhs);
    }
    while (minimise() > 0) filter([&](int c) { return z[c] > 0.0; });
    each(team, p, [&](int c) { l[c] = z[c]; });
  }

  // Fills x; reach is the size of the sums that q is made of. False when the minimum is -infinity; a caller whose q lies in
  // the range of C knows that it is not and says so: then a row that would prove it is rounding noise and is left alone.
  MMFAST_APART bool solve(double reach, bool in_range) {
    guess();
    bool bounded = true;
    for (int steps = 0; bounded && steps < 4 * k + 16;) {
      slacks();
      double size = reach;
      for (int c = 0; c < p; ++c) size += l[c];
      int j = -1;
      for (int i = 0; i < k; ++i)
        if (place[i] == kFree && s[i] < -kSlack * size && (j < 0 || s[i] < s[j])) j = i;
      if (j < 0) break;
      double mine = 0.0, slack = s[j];
      for (;; ++steps) {  // raise the multiplier of j; members whose own reaches zero leave
        double rhs;
        const double pivot = column(j, &rhs);
        each(team, p, [&](int c) { y[c] = L[p * k + c]; });
        substitute();
        int first = -1;
        double partial = INFINITY, weights = 1.0;
        for (int c = 0; c < p; ++c) weights += fabs(z[c]);
        for (int c = 0; c < p; ++c)
          if (z[c] > kZero * weights && l[c] < partial * z[c]) {
            first = c;
            partial = l[c] / z[c];
          }
        const double full = pivot > kRounding * weights * weights ? -slack / pivot : INFINITY;
        const bool dependent = !(full < INFINITY);
        const bool noise = dependent && slack >= -kDependentSlack * size;
        if (noise || (dependent && first < 0)) {
          bounded = noise || in_range;
          if (team.rank() == 0) place[j] = kRejected;
          team.sync();
          break;
        }
        const double step = full <= partial ? full : partial;
        team.sync();
        each(team, p, [&](int c) { l[c] = fmax(l[c] - step * z[c], 0.0); });
        mine += step;
        if (full <= partial) {
          join(j, pivot, rhs);
          if (team.rank() == 0) l[p - 1] = mine;
          team.sync();
          if (minimise() == 0) each(team, p, [&](int c) { l[c] = z[c]; });
          ++steps;
          break;
        }
        slack += step * pivot;
        if (team.rank() == 0)
          for (int c = first; c + 1 < p; ++c) l[c] = l[c + 1];
        filter([&](int c) { return c != first; });
      }
    }
    each(team, k, [&](int i) { x[i] = 0.0; });
    each(team, p, [&](int c) { x[set[c]] = l[c]; });
    return bounded;
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
