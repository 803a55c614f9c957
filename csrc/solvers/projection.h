// Rules that take the conflicting part out of each gradient, one other gradient at a time: PCGrad, GradVac.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace projection {

constexpr int kLanes = 8;
constexpr double kNever = 2e12;  // above every key, which are below 2^40

// The key by which row i meets row j, its own index in the lowest byte. A double holds it exactly and compares in vectors.
MMFAST_HD inline double key_of(const Problem& p, int i, int j, bool fixed) {
  const uint32_t drawn = fixed ? 0u : p.draw.integer(256u * static_cast<uint32_t>(p.rows[i]) + static_cast<uint32_t>(p.rows[j]));
  return 256.0 * drawn + j;
}

MMFAST_HD inline int row_of(double key) { return static_cast<int>(static_cast<int64_t>(key) & 255); }

// The smallest of f(0..k-1). Asking for the next conflict each time spares the sort: between two conflicts nothing changes.
template <class F>
MMFAST_HD inline double smallest(int k, F f) {
  double lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = kNever;
  int base = 0;
  for (; base + kLanes <= k; base += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const double x = f(base + l);
      lane[l] = x < lane[l] ? x : lane[l];
    }
  for (int l = 0; base + l < k; ++l) {
    const double x = f(base + l);
    lane[l] = x < lane[l] ? x : lane[l];
  }
  double best = lane[0];
  for (int l = 1; l < kLanes; ++l) best = lane[l] < best ? lane[l] : best;
  return best;
}

MMFAST_HD inline double dot(int k, const double* x, const double* y) {
  double lane[kLanes] = {};
  int base = 0;
  for (; base + kLanes <= k; base += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += x[base + l] * y[base + l];
  for (int l = 0; base + l < k; ++l) lane[l] += x[base + l] * y[base + l];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

}  // namespace projection

// PCGrad (Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020).
// params: 1 for the mean of the projected rows instead of their sum; 1 for the fixed order 0..K-1.
template <>
struct Rule<4> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool maps_rows = true;
  static constexpr const char* name = "PCGrad";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 2; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    using namespace projection;
    const int k = p.k;
    const double unit = p.params[0] != 0.0 ? 1.0 / k : 1.0;
    const bool fixed = p.params[1] != 0.0;
    each(team, k, [&](int i) {
      double* c = p.map + static_cast<long>(i) * k;           // coefficients of the projected row
      double* v = p.work + static_cast<long>(i) * k;          // its products with all rows, G c
      double* key = p.work + static_cast<long>(k + i) * k;
      bool conflict = false;
      for (int j = 0; j < k; ++j) {
        c[j] = 0.0;
        v[j] = unit * p.G[i * k + j];
        conflict |= v[j] < 0.0;
      }
      c[i] = unit;
      if (!conflict) return;
      for (int j = 0; j < k; ++j) key[j] = key_of(p, i, j, fixed);
      key[i] = -1.0;  // met before the start: a row never meets itself
      double last = -1.0;
      for (;;) {
        const double next = smallest(k, [=](int j) { return (v[j] < 0.0) & (key[j] > last) ? key[j] : kNever; });
        if (next == kNever) break;
        const int j = row_of(next);
        const double* row = p.G + static_cast<long>(j) * k;
        const double t = -v[j] / row[j];
        c[j] = t;
        for (int l = 0; l < k; ++l) v[l] += t * row[l];
        last = next;
      }
    });
  }
};

// GradVac (Wang et al., "Gradient vaccine", ICLR 2021): turns each gradient towards the running mean of its cosine with each other one.
// params: beta. State: the K x K running means.
template <>
struct Rule<5> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool maps_rows = true;
  static constexpr const char* name = "GradVac";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 1; }
  MMFAST_HD static int state_size(int K) { return K * K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    using namespace projection;
    constexpr double kCloseTo1 = 1.0 - 1e-12;  // cosines carry rounding errors of some 1e-16: closer to 1 is the same direction
    constexpr double kCancelled = 1e-14;       // a squared norm below this part of its summands' is their rounding error
    const int k = p.k;
    const double beta = p.params[0];
    double* inverse = p.work;  // 1 / |g_j|
    each(team, k, [&](int j) { inverse[j] = 1.0 / sqrt(p.G[static_cast<long>(j) * k + j]); });
    each(team, k, [&](int i) {
      double* c = p.map + static_cast<long>(i) * k;
      double* v = p.work + k + static_cast<long>(i) * k;
      double* key = v + static_cast<long>(k) * k;
      double* phi = key + static_cast<long>(k) * k;   // cosine at the moment of meeting
      double* goal = phi + static_cast<long>(k) * k;  // running mean before this call
      double* kept = p.state + static_cast<long>(p.rows[i]) * p.K;
      for (int j = 0; j < k; ++j) {
        c[j] = phi[j] = 0.0;
        v[j] = p.G[i * k + j];
        goal[j] = fmin(kept[p.rows[j]], kCloseTo1);
      }
      for (int j = 0; j < k; ++j) key[j] = key_of(p, i, j, false);
      key[i] = -1.0;
      c[i] = 1.0;
      double last = -1.0, norm = sqrt(v[i]), reach = norm;
      for (;;) {
        const double per_norm = norm > 0.0 ? 1.0 / norm : 0.0;  // a gradient that is gone has cosine 0 with all
        const double next = smallest(k, [=](int j) {
          const double x = v[j] * inverse[j] * per_norm;
          const double cosine = x > 1.0 ? 1.0 : x < -1.0 ? -1.0 : x;
          const bool ahead = key[j] > last;
          phi[j] = ahead ? cosine : phi[j];
          return ahead & (cosine < goal[j]) ? key[j] : kNever;
        });
        if (next == kNever) break;
        const int j = row_of(next);
        const double* row = p.G + static_cast<long>(j) * k;
        const double sine = sqrt((1.0 - phi[j]) * (1.0 + phi[j])), goal_sine = sqrt((1.0 - goal[j]) * (1.0 + goal[j]));
        const double t = norm * inverse[j] * (goal[j] * sine - phi[j] * goal_sine) / goal_sine;
        c[j] = t;
        for (int l = 0; l < k; ++l) v[l] += t * row[l];
        reach += fabs(t) / inverse[j];
        const double square = dot(k, c, v);
        norm = square > kCancelled * reach * reach ? sqrt(square) : 0.0;
        last = next;
      }
      for (int j = 0; j < k; ++j)
        if (j != i) kept[p.rows[j]] = (1.0 - beta) * kept[p.rows[j]] + beta * phi[j];
    });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
