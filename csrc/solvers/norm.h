// Giving sum_i w_i g_i the norm of the plain sum, as the impartial-optimisation code does.
//
// A Gramian that is known to `precision` knows the squared length of a sum to that times the square of its summands' lengths added up. Where
// the summands cancel and little more is left, lengths are measured on the elements, and a direction that a change of the Gramian within its
// precision would turn is not blown up to full length.
#pragma once

#include "linalg.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr double kMeasured = 8192.0;  // times the precision: a squared length below it, relative to its summands', is measured; above it is known to 1e-4
constexpr double kKnown = 64.0;       // times k times the precision: a squared length above it has a direction that the Gramian tells
constexpr double kMargin = 8.0;       // of a direction over what a change within the precision makes of it
constexpr double kLargest = 16.0;     // factor that is always taken: what it makes of rounding is still rounding

// What the Gramian says of the factor.
struct Norm {
  double factor;
  double settled;  // 1: factor is good; 0: the lengths are to be measured
  double noise;    // length of the resolved gradient below which its direction is not known, and its length falls off with the square
};

// A power of two near the largest weight: weights that follow the gradients' lengths may have squares that no number holds.
template <class Team>
MMFAST_HD inline double weight_unit(const Team& team, int k, const double* w) {
  double largest = 0.0;
  for (int i = 0; i < k; ++i) largest = fmax(largest, fabs(w[i]));
  team.sync();
  return largest > 0.0 && largest < HUGE_VAL ? ldexp(1.0, ilogb(largest)) : 1.0;
}

// Sum of |w_i| |g_i|.
template <class Team>
MMFAST_HD inline double norm_bound(const Team& team, int k, const double* G, const double* w) {
  return team.sum(k, [&](int i) { return fabs(w[i]) * sqrt(G[i * k + i]); });
}

// The factor of weights in their unit where there are no elements to measure: below the precision of the Gramian it is bounded.
template <class Team>
MMFAST_APART double norm_factor(const Team& team, int k, const double* G, const double* w, double precision) {
  const double plain = team.sum(k * k, [&](int e) { return G[e]; });
  const double resolved = quadratic_form(team, k, G, w), bound = norm_bound(team, k, G, w);
  return bound > 0.0 ? sqrt(fmax(plain, 0.0) / fmax(resolved, 16.0 * precision * bound * bound)) : 0.0;
}

// The factor of weights in their unit as far as the Gramian tells; `noise` is 1 where it is to be found out by shifted weights, else 0.
template <class Team>
MMFAST_APART Norm norm_of_gramian(const Team& team, int k, const double* G, const double* w, double precision) {
  const double plain = team.sum(k * k, [&](int e) { return G[e]; });
  const double plain_bound = team.sum(k, [&](int i) { return sqrt(G[i * k + i]); });
  const double resolved = quadratic_form(team, k, G, w), bound = norm_bound(team, k, G, w);
  const double least = kMeasured * precision, known = kKnown * k * precision;
  const bool settled = plain >= least * plain_bound * plain_bound && resolved >= least * bound * bound;
  return {resolved > 0.0 ? sqrt(fmax(plain, 0.0) / resolved) : 0.0, settled ? 1.0 : 0.0, !settled && resolved < known * bound * bound ? 1.0 : 0.0};
}

// Length below which a direction is not known when a change of the Gramian within its precision changes its weights by `change`.
template <class Team>
MMFAST_APART double norm_noise(const Team& team, int k, const double* G, const double* change, double precision) {
  const double square = quadratic_form(team, k, G, change);
  const double lift = k * precision * team.sum(k, [&](int i) { return change[i] * change[i] * G[i * k + i]; });
  return kMargin * sqrt(fmax(square + lift, 0.0));
}

// Entry (i, j) of a Gramian with every entry changed by its precision, up or down by a fixed pattern (Hadamard's).
MMFAST_HD inline double shifted_entry(const double* G, int K, int i, int j, double precision) {
  int odd = i & j;
  for (int half = 4; half > 0; half /= 2) odd ^= odd >> half;
  const double size = sqrt(G[static_cast<long>(i) * K + i]) * sqrt(G[static_cast<long>(j) * K + j]);
  return G[static_cast<long>(i) * K + j] + (odd & 1 ? -precision : precision) * size;
}

// The factor, from the squared lengths of the plain sum and of the resolved gradient where they had to be measured.
MMFAST_HD inline double measured_factor(const Norm& norm, double plain, double resolved) {
  if (norm.settled != 0.0) return norm.factor;
  if (!(plain < HUGE_VAL && resolved < HUGE_VAL)) return NAN;
  if (!(resolved > 0.0)) return 0.0;
  const double length = sqrt(resolved), wanted = sqrt(plain);
  const double trust = norm.noise > length ? length / norm.noise : 1.0;
  return fmin(wanted / length, fmax(wanted / length * trust * trust, kLargest));
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
