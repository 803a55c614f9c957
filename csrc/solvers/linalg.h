// Dense symmetric linear algebra for a team: Cholesky, and functions of a matrix applied to one vector.
//
// Column j of a matrix belongs to member j % size: a pass over rows then needs no barrier, and its inner loop runs
// along contiguous memory for one thread as well as for a warp.
#pragma once

#include <cfloat>

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

// Eigenvalues below this times the largest are the rounding of the Gramian, and count as zero.
MMFAST_HD inline double rank_cut(int n, double precision) { return 8.0 * precision * n; }

// Norms of the rows of G and their cosines, with an exact 1 on the diagonal.
template <class Team>
MMFAST_HD inline void cosines(const Team& team, int k, const double* G, double* norm, double* C) {
  each(team, k, [&](int i) { norm[i] = sqrt(G[i * k + i]); });
  each(team, k, [&](int i) {
    const double* __restrict__ from = G + i * k;
    double* __restrict__ row = C + i * k;
    const double norm_i = norm[i];
    for (int j = 0; j < k; ++j) row[j] = from[j] / (norm_i * norm[j]);
    row[i] = 1.0;
  });
}

// The first column from `begin` on that belongs to this member.
template <class Team>
MMFAST_HD inline int first_column(const Team& team, int begin) {
  const int column = begin - begin % team.size() + team.rank();
  return column < begin ? column + team.size() : column;
}

// y[0..n-1] = A x for symmetric A with leading dimension ld.
template <class Team>
MMFAST_HD inline void multiply(const Team& team, int n, const double* A, int ld, const double* __restrict__ x, double* __restrict__ y) {
  const int begin = first_column(team, 0);
  for (int j = begin; j < n; j += team.size()) y[j] = 0.0;
  for (int i = 0; i < n; ++i) {
    const double* __restrict__ row = A + i * ld;
    const double xi = x[i];
    for (int j = begin; j < n; j += team.size()) y[j] += row[j] * xi;
  }
  team.sync();
}

// x'Ax for A [n, n].
template <class Team>
MMFAST_HD inline double quadratic_form(const Team& team, int n, const double* A, const double* x) {
  return team.sum(n * n, [&](int e) { return x[e / n] * A[e] * x[e % n]; });
}

// Factors A = R'R in place: R above the diagonal, 1 / R_ii on it. A pivot below floor(i) is raised to it; returns the least pivot met.
template <class Team, class Floor>
MMFAST_HD inline double cholesky(const Team& team, int n, double* A, Floor floor) {
  double least = DBL_MAX;
  for (int j = 0; j < n; ++j) {
    double* __restrict__ top = A + j * n;
    const double pivot = top[j];
    least = fmin(least, pivot);
    const double inverse = 1.0 / sqrt(fmax(pivot, floor(j)));
    team.sync();
    for (int l = first_column(team, j + 1); l < n; l += team.size()) top[l] *= inverse;
    if (team.rank() == 0) top[j] = inverse;
    team.sync();
    for (int i = j + 1; i < n; ++i) {
      double* __restrict__ row = A + i * n;
      const double factor = top[i];
      for (int l = first_column(team, i); l < n; l += team.size()) row[l] -= factor * top[l];
    }
    team.sync();
  }
  return least;
}

// x <- (R'R)^-1 x for the factor that cholesky() leaves.
template <class Team>
MMFAST_APART void cholesky_solve(const Team& team, int n, const double* R, double* __restrict__ x) {
  for (int j = 0; j < n; ++j) {
    const double* __restrict__ row = R + j * n;
    const double xj = x[j] * row[j];
    team.sync();
    for (int l = first_column(team, j + 1); l < n; l += team.size()) x[l] -= row[l] * xj;
    if (team.rank() == 0) x[j] = xj;
    team.sync();
  }
  for (int j = n - 1; j >= 0; --j) {
    const double* row = R + j * n;
    const double known = team.sum(n - 1 - j, [&](int l) { return row[j + 1 + l] * x[j + 1 + l]; });
    team.sync();
    if (team.rank() == 0) x[j] = (x[j] - known) * row[j];
    team.sync();
  }
}

// V diag(values) V' of a symmetric matrix, with V kept as the reflections and rotations it is made of: applying V or V' to one
// vector takes O(n^2), and no eigenvector is ever formed.
class Spectrum {
 public:
  MMFAST_HD static long work_size(int n) { return 6L * n * n + 4L * n; }
  MMFAST_HD static long iwork_size(int n) { return 1 + 6L * n; }

  double* values;  // [n] in no order

  // Decomposes symmetric A [n, n], which is overwritten and must outlive this, and turns x [n] into V'x. Matrices whose entries
  // grow towards the last row keep their small eigenvalues accurate.
  template <class Team>
  MMFAST_HD Spectrum(const Team& team, int n, double* A, double* x, double* work, int* iwork)
      : values(work), n_(n), A_(A), off_(values + n), inverse_h_(off_ + n), scratch_(inverse_h_ + n), rotations_(scratch_ + n), sweeps_(iwork) {
    tridiagonalise(team);
    for (int m = n - 1; m >= 2; --m) reflect(team, m, x);
    if (team.rank() == 0) diagonalise(x);
    team.sync();
  }

  // x <- V x
  template <class Team>
  MMFAST_HD void apply(const Team& team, double* x) const {
    if (team.rank() == 0) {
      const int n_sweeps = sweeps_[0];
      const double* rotation = rotations_;
      for (int s = 0; s < n_sweeps; ++s) rotation += 2 * (sweeps_[1 + 2 * s] - sweeps_[2 + 2 * s] + 1);
      for (int s = n_sweeps - 1; s >= 0; --s)
        for (int i = sweeps_[2 + 2 * s]; i <= sweeps_[1 + 2 * s]; ++i) {
          rotation -= 2;
          const double a = x[i], b = x[i + 1];
          x[i] = rotation[0] * a + rotation[1] * b;
          x[i + 1] = rotation[0] * b - rotation[1] * a;
        }
    }
    team.sync();
    for (int m = 2; m < n_; ++m) reflect(team, m, x);
  }

 private:
  int n_;
  double* A_;          // row m holds, in its first m columns, the reflection that cleared it
  double* off_;        // [n] off-diagonal of the tridiagonal matrix
  double* inverse_h_;  // [n] 2 / v'v of each reflection, 0 where none was needed
  double* scratch_;
  double* rotations_;      // (cosine, sine) of every rotation, in order
  int* sweeps_;        // their number, then (first, last) row of each: a sweep rotates rows i, i + 1 for i = first down to last

  // A = Q T Q' with Q a product of reflections, from the last row up.
  template <class Team>
  MMFAST_APART void tridiagonalise(const Team& team) {
    const int n = n_, begin = first_column(team, 0);
    double* __restrict__ q = scratch_;
    for (int m = n - 1; m >= 2; --m) {
      double* __restrict__ v = A_ + m * n;
      const double rest = team.sum(m - 1, [&](int j) { return v[j] * v[j]; });
      const double corner = v[m - 1];
      team.sync();
      if (rest < 1e-280) {  // its square underflows; the trace is near 1
        if (team.rank() == 0) off_[m - 1] = corner, inverse_h_[m] = 0.0;
        continue;
      }
      const double length = copysign(sqrt(rest + corner * corner), corner);
      const double inverse_h = 1.0 / (rest + corner * corner + corner * length);
      if (team.rank() == 0) off_[m - 1] = -length, inverse_h_[m] = inverse_h, v[m - 1] = corner + length;
      team.sync();
      multiply(team, m, A_, n, v, q);
      const double half = 0.5 * inverse_h * (inverse_h * team.sum(m, [&](int j) { return v[j] * q[j]; }));
      team.sync();
      for (int j = begin; j < m; j += team.size()) q[j] = inverse_h * q[j] - half * v[j];
      team.sync();
      for (int i = 0; i < m; ++i) {
        double* __restrict__ row = A_ + i * n;
        const double vi = v[i], qi = q[i];
        for (int j = begin; j < m; j += team.size()) row[j] -= vi * q[j] + qi * v[j];
      }
      team.sync();
    }
    if (team.rank() == 0 && n >= 2) off_[0] = A_[n];
    each(team, n, [&](int i) { values[i] = A_[i * n + i]; });
  }

  template <class Team>
  MMFAST_APART void reflect(const Team& team, int m, double* __restrict__ x) const {
    const double* __restrict__ v = A_ + m * n_;
    const double along = inverse_h_[m] * team.sum(m, [&](int j) { return v[j] * x[j]; });
    team.sync();
    for (int j = first_column(team, 0); j < m; j += team.size()) x[j] -= along * v[j];
    team.sync();
  }

  // Implicit QL with Wilkinson's shift on (values, off_): applies every rotation to x and keeps it.
  MMFAST_APART void diagonalise(double* x) {
    const int n = n_;
    const long max_rotations = 3L * n * n;
    double* d = values;
    double* rotation = rotations_;
    int n_sweeps = 0;
    for (int l = 0; l < n - 1; ++l) {
      for (;;) {
        int m = l;
        while (m < n - 1 && fabs(off_[m]) > DBL_EPSILON * (fabs(d[m]) + fabs(d[m + 1])) + 1e-150) ++m;
        if (m == l || n_sweeps == 3 * n - 1 || (rotation - rotations_) / 2 + (m - l) > max_rotations) break;
        const double gap = (d[l + 1] - d[l]) / (2.0 * off_[l]);
        double g = d[m] - d[l] + off_[l] / (gap + copysign(sqrt(gap * gap + 1.0), gap));
        double cosine = 1.0, sine = 1.0, shift = 0.0;
        int i = m - 1;
        for (; i >= l; --i) {
          const double f = sine * off_[i], b = cosine * off_[i];
          const double r = sqrt(f * f + g * g);
          off_[i + 1] = r;
          if (r == 0.0) break;
          sine = f / r;
          cosine = g / r;
          g = d[i + 1] - shift;
          const double t = (d[i] - g) * sine + 2.0 * cosine * b;
          shift = sine * t;
          d[i + 1] = g + shift;
          g = cosine * t - b;
          rotation[0] = cosine;
          rotation[1] = sine;
          rotation += 2;
          const double upper = x[i + 1];
          x[i + 1] = sine * x[i] + cosine * upper;
          x[i] = cosine * x[i] - sine * upper;
        }
        sweeps_[1 + 2 * n_sweeps] = m - 1;
        sweeps_[2 + 2 * n_sweeps] = i + 1;
        ++n_sweeps;
        off_[m] = 0.0;
        if (i >= l) {  // the chain fell apart at i: its upper end keeps the shift
          d[i + 1] -= shift;
        } else {
          d[l] -= shift;
          off_[l] = g;
        }
      }
    }
    sweeps_[0] = n_sweeps;
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
