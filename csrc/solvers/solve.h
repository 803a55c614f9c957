// From a K x K Gramian to K weights: leaves out missing rows, scales, runs a chain of rules, preserves the norm.
#pragma once

#include <cstring>

#include "rules.h"

namespace mmfast {
namespace MMFAST_ISA {

// A chain of rules; steps holds (rule id, number of parameters) pairs, params their parameters one after the other.
struct Chain {
  const int64_t* steps;
  int n_steps;
  const double* params;
  bool preserve_norm;
  double precision = DBL_EPSILON;  // of the numbers that G was made of: what is smaller than it is rounding
};

MMFAST_HD inline int chain_state_size(const Chain& chain, int K) {
  int size = 0;
  for (int s = 0; s < chain.n_steps; ++s)
    with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) { size += decltype(rule)::state_size(K); });
  return size;
}

MMFAST_HD inline long solve_work_size(int K) { return 4L * K * K + K + work_size(K); }
MMFAST_HD inline long solve_iwork_size(int K) { return K + iwork_size(K); }

// What one problem reads and writes. G is [K, K]; mask is [K] or null; state may be null when the chain keeps none.
struct Io {
  const double* G;
  const bool* mask;
  double* state;
  uint64_t seed;
  uint32_t counter;
  uint32_t problem;
  double* w;
};

// Copies the rows of G (leading dimension K) that take part to dense[k, k], divided by a power of four; returns false if one is not finite.
template <class Team>
MMFAST_APART bool compact(const Team& team, const double* G, int K, const bool* mask, int* row_index, double* dense, int* k_out, double* scale_out) {
  int k = 0;
  for (int i = 0; i < K; ++i)
    if ((!mask || mask[i]) && G[static_cast<long>(i) * K + i] != 0.0) {
      if (team.rank() == 0) row_index[k] = i;
      ++k;
    }
  team.sync();
  *k_out = k;
  double trace = 0.0;
  uint64_t largest = 0;  // bits without the sign are ordered like magnitudes, infinity and NaN last; a maximum of integers vectorises
  for (int i = 0; i < k; ++i) {
    const double* from = G + static_cast<long>(row_index[i]) * K;
    trace += from[row_index[i]];
    for (int j = 0; j < k; ++j) {
      const double g = k == K ? from[j] : from[row_index[j]];
      uint64_t bits;
      memcpy(&bits, &g, sizeof bits);
      bits &= 0x7fffffffffffffffull;
      largest = bits > largest ? bits : largest;
    }
  }
  if (largest >= 0x7ff0000000000000ull || !(trace <= 1.7976931348623157e308)) return false;
  const int exponent = k ? ilogb(trace) : 0;
  const int even = exponent - (exponent & 1);
  *scale_out = ldexp(1.0, even);
  const double half = ldexp(1.0, -even / 2);  // twice, for the whole factor may not be a number where its halves are
  each(team, k, [&](int i) {
    const double* from = G + static_cast<long>(row_index[i]) * K;
    if (k == K)
      for (int j = 0; j < k; ++j) dense[i * k + j] = half * from[j] * half;
    else
      for (int j = 0; j < k; ++j) dense[i * k + j] = half * from[row_index[j]] * half;
  });
  return true;
}

// The factor that gives sum_i w_i g_i the norm of sum_i g_i (impartial-optimisation paper, released code).
template <class Team>
MMFAST_APART double norm_factor(const Team& team, int k, const double* G, const double* w, double precision) {
  const double plain = team.sum(k * k, [&](int e) { return G[e]; });
  const double resolved = quadratic_form(team, k, G, w);
  const double norm_bound = team.sum(k, [&](int i) { return fabs(w[i]) * sqrt(G[i * k + i]); });
  const double floor = 16.0 * precision * norm_bound * norm_bound;  // below it the length of d is rounding of G: not to be blown up
  return norm_bound > 0.0 ? sqrt(fmax(plain, 0.0) / fmax(resolved, floor)) : 0.0;
}

// After a step that turns row i into sum_j map[i, j] g_j (w[i] g_i when map is null): total <- map * total, current <- map * dense * map' * scale.
// Rows that did not take part become zero, and so do rows of which only rounding errors are left.
template <class Team>
MMFAST_APART void apply_map(const Team& team, int k, int K, const double* map, const double* w, const int* row_index, const double* dense, double scale,
                            double* total, double* current, double* scratch) {
  double* new_total = scratch;                                  // [k, K]
  double* map_dense = new_total + static_cast<long>(k) * K;     // [k, k] map * dense
  double* map_t = map_dense + static_cast<long>(k) * k;         // [k, k] map'
  double* new_dense = map_t + static_cast<long>(k) * k;         // [k, k] map * dense * map'
  each(team, k, [&](int i) {
    double* __restrict__ out = new_total + static_cast<long>(i) * K;
    double* __restrict__ product = map_dense + static_cast<long>(i) * k;
    for (int c = 0; c < K; ++c) out[c] = map ? 0.0 : w[i] * total[static_cast<long>(row_index[i]) * K + c];
    for (int c = 0; c < k; ++c) product[c] = 0.0;
    for (int j = 0; map && j < k; ++j) {
      const double a = map[static_cast<long>(i) * k + j];
      const double *from = total + static_cast<long>(row_index[j]) * K, *of = dense + static_cast<long>(j) * k;
      for (int c = 0; c < K; ++c) out[c] += a * from[c];
      for (int c = 0; c < k; ++c) product[c] += a * of[c];
      map_t[static_cast<long>(j) * k + i] = a;
    }
  });
  each(team, k, [&](int i) {
    double* __restrict__ out = new_dense + static_cast<long>(i) * k;
    for (int c = 0; c < k; ++c) out[c] = map ? 0.0 : w[i] * dense[static_cast<long>(i) * k + c] * w[c];
    for (int l = 0; map && l < k; ++l) {
      const double a = map_dense[static_cast<long>(i) * k + l];
      const double* from = map_t + static_cast<long>(l) * k;
      for (int c = 0; c < k; ++c) out[c] += a * from[c];
    }
    double norm_bound = 0.0;
    for (int l = 0; l < k; ++l) norm_bound += fabs(map ? map[static_cast<long>(i) * k + l] : l == i ? w[i] : 0.0) * sqrt(dense[static_cast<long>(l) * k + l]);
    if (out[i] <= kCancelled * norm_bound * norm_bound) out[i] = 0.0;
  });
  each(team, K * K, [&](int e) { current[e] = total[e] = 0.0; });
  each(team, k, [&](int i) {
    for (int c = 0; c < K; ++c) total[static_cast<long>(row_index[i]) * K + c] = new_total[static_cast<long>(i) * K + c];
    for (int j = 0; j <= i; ++j)  // the lower half for both; a zero on the diagonal takes the row out
      current[static_cast<long>(row_index[i]) * K + row_index[j]] = current[static_cast<long>(row_index[j]) * K + row_index[i]] = scale * new_dense[static_cast<long>(i) * k + j];
  });
}

// One rule.
template <class R, class Team>
MMFAST_APART void solve_rule(const Team& team, Problem& problem) {
  R::solve(team, problem);
}

template <class Team>
MMFAST_HD inline void solve(const Team& team, const Chain& chain, int K, const Io& io, double* work, int* iwork) {
  double* dense = work;               // [k, k] the problem of this step
  double* map = dense + static_cast<long>(K) * K;    // [k, k] its row map
  double* current = map + static_cast<long>(K) * K;  // [K, K] the Gramian after the steps so far
  double* total = current + static_cast<long>(K) * K;  // [K, K] the row map of the steps so far
  double* w = total + static_cast<long>(K) * K;
  double* scratch = w + K;
  int* row_index = iwork;
  int k = 0;
  double scale = 1.0;
  if (!compact(team, io.G, K, io.mask, row_index, dense, &k, &scale)) {
    each(team, K, [&](int i) { io.w[i] = !io.mask || io.mask[i] ? NAN : 0.0; });
    each(team, K, [&](int i) {
      if (io.G[static_cast<long>(i) * K + i] == 0.0) io.w[i] = 0.0;
    });
    return;
  }
  each(team, K, [&](int i) { io.w[i] = 0.0; });
  if (k == 0) return;

  const int first_k = k;
  bool single = true;  // so far one step only: no product of maps to keep
  const double* params = chain.params;
  double* state = io.state;
  for (int s = 0; s < chain.n_steps; ++s) {
    Problem p{k, K, row_index, dense, scale, params, static_cast<int>(chain.steps[2 * s + 1]), state,
              Draw{io.seed, io.counter, io.problem, static_cast<uint32_t>(s)}, w, map, scratch, iwork + K, chain.precision};
    bool maps = false;
    with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) {
      using R = decltype(rule);
      solve_rule<R>(team, p);
      maps = R::maps_rows;
      if (state) state += R::state_size(K);
    });
    params += chain.steps[2 * s + 1];
    team.sync();
    if (maps)
      each(team, k, [&](int j) {
        double column = 0.0;
        for (int i = 0; i < k; ++i) column += map[i * k + j];
        w[j] = column;
      });
    if (s + 1 < chain.n_steps) {
      bool smooths = false;
      with_rule(static_cast<int>(chain.steps[2 * s + 2]), [&](auto rule) { smooths = decltype(rule)::smooths; });
      if (smooths) {
        ++s;
        Problem q = p;
        q.params = params;
        q.n_params = static_cast<int>(chain.steps[2 * s + 1]);
        q.state = state;
        with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) {
          using R = decltype(rule);
          solve_rule<R>(team, q);
          if (state) state += R::state_size(K);
        });
        params += chain.steps[2 * s + 1];
        team.sync();
        maps = false;
      }
    }
    const bool last = s + 1 >= chain.n_steps;
    if (last && single) {
      each(team, k, [&](int i) { io.w[row_index[i]] = w[i]; });
      break;
    }
    // The weights are the column sums of the product of all maps: total' w, with w the column sums of the last one.
    if (last) {
      each(team, K, [&](int j) { io.w[j] = 0.0; });
      for (int i = 0; i < k; ++i) each(team, K, [&](int j) { io.w[j] += w[i] * total[static_cast<long>(row_index[i]) * K + j]; });
      break;
    }
    if (single) each(team, K * K, [&](int e) { total[e] = e / K == e % K ? 1.0 : 0.0; });
    single = false;
    apply_map(team, k, K, maps ? map : nullptr, w, row_index, dense, scale, total, current, scratch);
    if (!compact(team, current, K, nullptr, row_index, dense, &k, &scale) || k == 0) {
      const double value = k ? NAN : 0.0;
      each(team, K, [&](int i) { io.w[i] = io.G[static_cast<long>(i) * K + i] != 0.0 && (!io.mask || io.mask[i]) ? value : 0.0; });
      return;
    }
  }

  if (chain.preserve_norm) {
    if (!single || k != first_k) compact(team, io.G, K, io.mask, row_index, dense, &k, &scale);
    each(team, k, [&](int i) { w[i] = io.w[row_index[i]]; });
    const double factor = norm_factor(team, k, dense, w, chain.precision);
    each(team, k, [&](int i) { io.w[row_index[i]] = factor * w[i]; });
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
