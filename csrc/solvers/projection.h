// Rules that take the conflicting part out of each gradient, one other gradient at a time: PCGrad, GradVac.
#pragma once

#include "problem.h"
#include "sort.h"

namespace mmfast {
namespace MMFAST_ISA {

namespace projection {

constexpr int kDotLanes = 8;

constexpr int kMostRows = 4096;  // a key holds the number of a row below it

// order[s, i] <- kMostRows * draw + j, ascending in s, where j is the row that row i meets in step s; in step 0 it is row i itself.
// A double holds such a key exactly. The draws are those of the whole problem's rows: a missing row changes no other one's order.
template <class Team>
MMFAST_HD inline void draw_order(const Team& team, const Problem& p, bool fixed, double* order) {
  const int k = p.k;
  const int* row_index = p.row_index;
  const Draw draw = p.draw;
  const bool drawn = !fixed && k > 2;
  const uint32_t row = p.K <= 256 ? 256u : kMostRows;  // from the place of one row's draws to the next one's
  for (int j = 0; j < k; ++j)
    each(team, k, [=](int i) {
      const double key = drawn ? 1.0 * kMostRows * draw.integer(row * static_cast<uint32_t>(row_index[i]) + static_cast<uint32_t>(row_index[j])) + j : j;
      order[j * k + i] = i == j ? j - 1.0 * kMostRows : key;
    });
  sort_columns(team, k, k, order);
}

MMFAST_HD inline int row_of(double key) { return static_cast<int>(static_cast<int64_t>(key) & (kMostRows - 1)); }

MMFAST_HD inline double dot(int k, const double* x, const double* y) {
  double lane[kDotLanes] = {};
  int base = 0;
  for (; base + kDotLanes <= k; base += kDotLanes)
    for (int l = 0; l < kDotLanes; ++l) lane[l] += x[base + l] * y[base + l];
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
    const int k = p.k;
    const double unit = p.params[0] != 0.0 ? 1.0 / k : 1.0;
    double* order = p.work;
    projection::draw_order(team, p, p.params[1] != 0.0, order);
    each(team, k, [&](int i) {
      double* __restrict__ c = p.map + static_cast<long>(i) * k;            // coefficients of the projected row
      double* __restrict__ v = p.work + static_cast<long>(k + i) * k;       // its products with all rows, G c
      for (int j = 0; j < k; ++j) {
        c[j] = 0.0;
        v[j] = unit * p.G[static_cast<long>(i) * k + j];
      }
      c[i] = unit;
      for (int s = 1; s < k; ++s) {
        const int j = projection::row_of(order[s * k + i]);
        if (v[j] >= 0.0) continue;
        const double* row = p.G + static_cast<long>(j) * k;
        const double t = -v[j] / row[j];
        c[j] = t;
        for (int l = 0; l < k; ++l) v[l] += t * row[l];
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
    const double close_to_1 = 1.0 - fmax(1e-12, 4.0 * p.precision);  // closer to 1 than cosines are known is the same direction
    const double gone = cancelled(p.precision);
    const int k = p.k;
    const double beta = p.params[0];
    double* length = p.work;
    double* order = length + k;
    projection::draw_order(team, p, false, order);
    each(team, k, [&](int j) { length[j] = sqrt(p.G[static_cast<long>(j) * k + j]); });
    each(team, k, [&](int i) {
      double* __restrict__ c = p.map + static_cast<long>(i) * k;
      double* __restrict__ v = order + static_cast<long>(k + i) * k;
      for (int j = 0; j < k; ++j) {
        c[j] = 0.0;
        v[j] = p.G[static_cast<long>(i) * k + j];
      }
      c[i] = 1.0;
      double norm = length[i], norm_bound = norm;
      for (int s = 1; s < k; ++s) {
        const int j = projection::row_of(order[s * k + i]);
        double& mean_cosine = p.state[static_cast<long>(p.row_index[i]) * p.K + p.row_index[j]];
        const double goal = fmin(mean_cosine, close_to_1);
        // a gradient that is gone has cosine 0 with all
        const double cosine = norm > 0.0 ? fmax(-1.0, fmin(1.0, v[j] / (norm * length[j]))) : 0.0;
        mean_cosine = (1.0 - beta) * mean_cosine + beta * cosine;
        if (cosine >= goal) continue;
        const double sine = sqrt((1.0 - cosine) * (1.0 + cosine)), goal_sine = sqrt((1.0 - goal) * (1.0 + goal));
        const double t = norm * (goal * sine - cosine * goal_sine) / (length[j] * goal_sine);
        const double* row = p.G + static_cast<long>(j) * k;
        c[j] = t;
        for (int l = 0; l < k; ++l) v[l] += t * row[l];
        norm_bound += fabs(t) * length[j];
        const double square = projection::dot(k, c, v);
        norm = square > gone * norm_bound * norm_bound ? sqrt(square) : 0.0;
      }
    });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
