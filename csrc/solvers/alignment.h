// Rules that align the rows with one another: IMTLG, AlignedMTL, ConFIG.
#pragma once

#include "linalg.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace alignment {

// What IMTLG and ConFIG share: multiples a = D^-1 C^+ b of the gradients whose sum has inner products b_i with the unit rows (as far
// as b lies in the range of C), with C the cosines and D the norms. Solving on C keeps badly scaled rows accurate.
struct Multiples {
  double* norm;    // [k] D
  double* a;       // [k]
  double* cosine;  // [k] inner product of sum_i a_i g_i with each unit row; b itself at full rank
  double square;   // |sum_i a_i g_i|^2; 0 where the rows admit no such direction
};

template <class Team, class F>
MMFAST_HD inline Multiples multiples(const Team& team, Problem& p, F b) {
  const int k = p.k;
  double* C = p.work + Spectrum::work_size(k);
  Multiples out{C + k * k, C + k * k + k, C + k * k + 2 * k, 0.0};
  each(team, k, [&](int i) { out.a[i] = out.cosine[i] = b(i); });
  cosines(team, k, p.G, out.norm, C);
  const double least = cholesky(team, k, C, [](int) { return DBL_EPSILON; });
  if (least > fmax(1e-8, 8.0 * rank_cut(k, p.precision))) {
    cholesky_solve(team, k, C, out.a);
    out.square = team.sum(k, [&](int i) { return out.a[i] * b(i); });
  } else {
    cosines(team, k, p.G, out.norm, C);
    const Spectrum spectrum(team, k, C, out.a, p.work, p.iwork);
    const double* values = spectrum.values;
    double largest = 0.0;
    for (int i = 0; i < k; ++i) largest = fmax(largest, values[i]);
    const double cut = largest * rank_cut(k, p.precision);
    each(team, k, [&](int i) { out.cosine[i] = values[i] > cut ? out.a[i] : 0.0; });
    const double kept_square = team.sum(k, [&](int i) { return out.cosine[i] * out.cosine[i]; });
    const double b_square = team.sum(k, [&](int i) { return out.a[i] * out.a[i]; });
    each(team, k, [&](int i) { out.a[i] = values[i] > cut ? out.a[i] / values[i] : 0.0; });
    const double square = team.sum(k, [&](int i) { return out.a[i] * out.cosine[i]; });
    out.square = kept_square > 1e-24 * b_square ? square : 0.0;  // below it, what is left of b is rounding
    team.sync();
    spectrum.apply(team, out.a);
    spectrum.apply(team, out.cosine);
  }
  each(team, k, [&](int i) { out.a[i] /= out.norm[i]; });
  return out;
}

}  // namespace alignment

// IMTL-G (Liu et al., "Towards impartial multi-task learning", ICLR 2021): equal projections on all unit rows, weights that sum to 1.
template <>
struct Rule<13> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "IMTLG";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const alignment::Multiples m = alignment::multiples(team, p, [](int) { return 1.0; });
    const double total = team.sum(p.k, [&](int i) { return m.a[i]; });
    const double abs_total = team.sum(p.k, [&](int i) { return fabs(m.a[i]); });
    const bool defined = m.square > 0.0 && fabs(total) > 1e-12 * abs_total;
    each(team, p.k, [&](int i) { p.w[i] = defined ? m.a[i] / total : 0.0; });
  }
};

// Aligned-MTL (Senushkin et al., CVPR 2023): w = sqrt(sigma) G^(-1/2) pref. params: scale (0 min, 1 median, 2 rmse), then pref or nothing.
template <>
struct Rule<14> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "AlignedMTL";
  MMFAST_HD static bool takes(int K, int n_params) { return n_params == 1 || n_params == 1 + K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k;
    double* A = p.work + Spectrum::work_size(k);
    double* x = A + k * k;
    int* order = p.iwork + Spectrum::iwork_size(k);  // rows by ascending norm, for the sake of the small eigenvalues
    each(team, k, [&](int i) {
      int rank = 0;
      for (int j = 0; j < k; ++j) rank += p.G[j * k + j] < p.G[i * k + i] || (p.G[j * k + j] == p.G[i * k + i] && j < i);
      order[rank] = i;
    });
    each(team, k, [&](int i) {
      for (int j = 0; j < k; ++j) A[i * k + j] = p.G[order[i] * k + order[j]];
      x[i] = preference(p, order[i], 1, 1.0 / k);
    });
    const Spectrum spectrum(team, k, A, x, p.work, p.iwork);
    double* values = spectrum.values;
    double largest = 0.0;
    for (int i = 0; i < k; ++i) largest = fmax(largest, values[i]);
    const double cut = largest * rank_cut(k, p.precision);
    const double sigma = scale(team, k, values, cut, static_cast<int>(p.params[0]));
    each(team, k, [&](int i) { x[i] = values[i] > cut ? x[i] * sqrt(sigma / values[i]) : 0.0; });
    spectrum.apply(team, x);
    each(team, k, [&](int i) { p.w[order[i]] = x[i]; });
  }

 private:
  // The common squared norm of the aligned rows, from the eigenvalues above the cut.
  template <class Team>
  MMFAST_HD static double scale(const Team& team, int k, const double* values, double cut, int kind) {
    const double count = team.sum(k, [&](int i) { return values[i] > cut ? 1.0 : 0.0; });
    if (kind == 2) return team.sum(k, [&](int i) { return values[i] > cut ? values[i] : 0.0; }) / count;
    const int target = kind == 0 ? 0 : (static_cast<int>(count) - 1) / 2;
    double found = 0.0;
    for (int i = 0; i < k; ++i) {
      int rank = 0;
      for (int j = 0; j < k; ++j) rank += values[j] > cut && (values[j] < values[i] || (values[j] == values[i] && j < i));
      if (values[i] > cut && rank == target) found = values[i];
    }
    return found;
  }
};

// ConFIG (Liu et al., "Towards conflict-free training of physics informed neural networks", ICLR 2025): the direction with the preferred
// cosines to all rows. params: length model (0 projection, 1 min, 2 max, 3 harmonic, 4 arithmetic, 5 geometric, 6 + i the norm of row i, or 4 where that
// is missing), then pref or nothing.
template <>
struct Rule<15> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr const char* name = "ConFIG";
  MMFAST_HD static bool takes(int K, int n_params) { return n_params == 1 || n_params == 1 + K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    const int k = p.k, kind = static_cast<int>(p.params[0]);
    const alignment::Multiples m = alignment::multiples(team, p, [&](int i) { return preference(p, i, 1, 1.0); });
    const double along = kind == 0 ? team.sum(k, [&](int i) { return m.norm[i] * m.cosine[i]; })
                                   : tracked_length(team, p, m.norm, kind) * team.sum(k, [&](int i) { return m.cosine[i]; });
    const double factor = m.square > 0.0 ? along / m.square : 0.0;
    each(team, k, [&](int i) { p.w[i] = factor * m.a[i]; });
  }

 private:
  template <class Team>
  MMFAST_HD static double tracked_length(const Team& team, const Problem& p, const double* norm, int kind) {
    const int k = p.k;
    for (int i = 0; i < k; ++i)
      if (kind == 6 + p.row_index[i]) return norm[i];
    double least = norm[0], most = norm[0];
    for (int i = 1; i < k; ++i) least = fmin(least, norm[i]), most = fmax(most, norm[i]);
    if (kind == 1) return least;
    if (kind == 2) return most;
    if (kind == 3) return k / team.sum(k, [&](int i) { return 1.0 / norm[i]; });
    if (kind == 4 || kind > 5) return team.sum(k, [&](int i) { return norm[i]; }) / k;
    return exp(team.sum(k, [&](int i) { return log(norm[i]); }) / k);
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
