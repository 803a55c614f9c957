// From a K x K Gramian to K weights: leaves out missing rows, scales, runs a chain of rules, preserves the norm.
#pragma once

#include <cstring>

#include "norm.h"
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

MMFAST_HD inline bool chain_reads_gramian(const Chain& chain) {
  bool reads = false;
  for (int s = 0; s < chain.n_steps; ++s)
    with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) { reads = reads || decltype(rule)::reads_gramian; });
  return reads;
}

MMFAST_HD inline int chain_state_size(const Chain& chain, int K) {
  int size = 0;
  for (int s = 0; s < chain.n_steps; ++s)
    with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) { size += decltype(rule)::state_size(K); });
  return size;
}

// state_size is that of the chain.
MMFAST_HD inline long solve_work_size(int K, int state_size) { return 5L * K * K + 3L * K + state_size + work_size(K); }
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
  Norm* norm = nullptr;  // where the norm is preserved and there are elements to measure: what w is still to be multiplied by
};

// Scratch of solve().
struct Workspace {
  double* dense;     // [k, k] the problem of a step
  double* map;       // [k, k] its row map
  double* current;   // [K, K] the Gramian after the steps so far
  double* total;     // [K, K] the row map of the steps so far
  double* shifted;   // [K, K] the Gramian changed within its precision
  double* w;         // [K]
  double* diagonal;  // [K] of dense, while it is lifted
  double* kept_w;    // [K] weights of the Gramian as it is
  double* state;     // as it was before the call
  double* scratch;   // of the rules
  int *row_index, *iwork;
  MMFAST_HD Workspace(int K, int state_size, double* work, int* iwork)
      : dense(work), map(dense + square(K)), current(map + square(K)), total(current + square(K)), shifted(total + square(K)), w(shifted + square(K)), diagonal(w + K),
        kept_w(diagonal + K), state(kept_w + K), scratch(state + state_size), row_index(iwork), iwork(iwork + K) {}
  MMFAST_HD static long square(int K) { return static_cast<long>(K) * K; }
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

// w[j] <- the sum of column j of a row map.
template <class Team>
MMFAST_HD inline void column_sums(const Team& team, int k, const double* map, double* w) {
  each(team, k, [&](int j) {
    double column = 0.0;
    for (int i = 0; i < k; ++i) column += map[i * k + j];
    w[j] = column;
  });
}

// After a step that turns row i into sum_j map[i, j] g_j (w[i] g_i when map is null): total <- map * total, current <- map * dense * map' * scale.
// Rows that did not take part become zero, and so do rows of which only rounding errors are left.
template <class Team>
MMFAST_APART void apply_map(const Team& team, int k, int K, const double* map, const double* w, const int* row_index, const double* dense, double scale,
                            double precision, double* total, double* current, double* scratch) {
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
    if (out[i] <= cancelled(precision) * norm_bound * norm_bound) out[i] = 0.0;
  });
  each(team, K * K, [&](int e) { current[e] = total[e] = 0.0; });
  each(team, k, [&](int i) {
    for (int c = 0; c < K; ++c) total[static_cast<long>(row_index[i]) * K + c] = new_total[static_cast<long>(i) * K + c];
    for (int j = 0; j <= i; ++j)  // the lower half for both; a zero on the diagonal takes the row out
      current[static_cast<long>(row_index[i]) * K + row_index[j]] = current[static_cast<long>(row_index[j]) * K + row_index[i]] = scale * new_dense[static_cast<long>(i) * k + j];
  });
}

// One rule. One that follows the inverse of the Gramian gets it with its diagonal raised by k times the precision: entries known to that make a
// Gramian that may have negative eigenvalues, and so raised it has none, as if each gradient had a small part of its own that no other one has; no
// weights then make a vector longer than it says. A float64 Gramian stays as it is: there the rules know what rounding is, and `lift` is zero.
template <class R, class Team>
MMFAST_APART void solve_rule(const Team& team, Problem& p, double lift, double* G, double* diagonal) {
  const bool lifts = R::lifts && lift > 0.0;
  p.lift = lifts ? lift : 0.0;
  if (lifts)
    each(team, p.k, [&](int i) {
      diagonal[i] = G[i * p.k + i];
      G[i * p.k + i] += p.lift * diagonal[i];
    });
  R::solve(team, p);
  team.sync();
  if (lifts) each(team, p.k, [&](int i) { G[i * p.k + i] = diagonal[i]; });
}

// Weights [K] of G by a chain, without the norm; `state` moves on. False where no weight is a number or all are zero. `lifted` is how many
// times its precision the diagonal is raised for each row.
template <class Team>
MMFAST_APART bool run_chain(const Team& team, const Chain& chain, int K, const Io& io, const double* G, double* state, const Workspace& at, double lifted) {
  int k = 0;
  double scale = 1.0;
  if (!compact(team, G, K, io.mask, at.row_index, at.dense, &k, &scale)) {
    each(team, K, [&](int i) { io.w[i] = !io.mask || io.mask[i] ? NAN : 0.0; });
    each(team, K, [&](int i) {
      if (G[static_cast<long>(i) * K + i] == 0.0) io.w[i] = 0.0;
    });
    return false;
  }
  each(team, K, [&](int i) { io.w[i] = 0.0; });
  if (k == 0) return false;

  double *w = at.w, *total = at.total;
  bool single = true;  // so far one step only: no product of maps to keep
  const double* params = chain.params;
  for (int s = 0; s < chain.n_steps; ++s) {
    Problem p{k, K, at.row_index, at.dense, scale, params, static_cast<int>(chain.steps[2 * s + 1]), state,
              Draw{io.seed, io.counter, io.problem, static_cast<uint32_t>(s)}, w, at.map, at.scratch, at.iwork, chain.precision, 0.0};
    bool maps = false, smooths = false, due = true;
    if (s + 1 < chain.n_steps) {  // whether the step after this one keeps the weights of an earlier call
      double* next_state = state;
      if (state) with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) { next_state += decltype(rule)::state_size(K); });
      with_rule(static_cast<int>(chain.steps[2 * s + 2]), [&](auto rule) { due = decltype(rule)::due(p, params + chain.steps[2 * s + 1], next_state); });
    }
    for (int part = 0; part < 2; ++part) {  // a rule, and the one that smooths its weights
      if (part) {
        if (s + 1 < chain.n_steps) with_rule(static_cast<int>(chain.steps[2 * s + 2]), [&](auto rule) { smooths = decltype(rule)::smooths; });
        if (!smooths) break;
        ++s;
        p.params = params;
        p.n_params = static_cast<int>(chain.steps[2 * s + 1]);
        p.state = state;
        if (maps) column_sums(team, k, at.map, w);
        maps = false;
      }
      with_rule(static_cast<int>(chain.steps[2 * s]), [&](auto rule) {
        using R = decltype(rule);
        if (part || due) {
          solve_rule<R>(team, p, chain.precision > DBL_EPSILON ? lifted * k * chain.precision : 0.0, at.dense, at.diagonal);
          maps = R::maps_rows;
        }
        if (state) state += R::state_size(K);
      });
      params += chain.steps[2 * s + 1];
    }
    if (maps) column_sums(team, k, at.map, w);
    const bool last = s + 1 >= chain.n_steps;
    if (last && single) {
      each(team, k, [&](int i) { io.w[at.row_index[i]] = w[i]; });
      break;
    }
    // The weights are the column sums of the product of all maps: total' w, with w the column sums of the last one.
    if (last) {
      each(team, K, [&](int j) { io.w[j] = 0.0; });
      for (int i = 0; i < k; ++i) each(team, K, [&](int j) { io.w[j] += w[i] * total[static_cast<long>(at.row_index[i]) * K + j]; });
      break;
    }
    if (single) each(team, K * K, [&](int e) { total[e] = e / K == e % K ? 1.0 : 0.0; });
    single = false;
    apply_map(team, k, K, maps ? at.map : nullptr, w, at.row_index, at.dense, scale, chain.precision, total, at.current, at.scratch);
    if (!compact(team, at.current, K, nullptr, at.row_index, at.dense, &k, &scale) || k == 0) {
      const double value = k ? NAN : 0.0;
      each(team, K, [&](int i) { io.w[i] = G[static_cast<long>(i) * K + i] != 0.0 && (!io.mask || io.mask[i]) ? value : 0.0; });
      return false;
    }
  }
  return true;
}

template <class Team>
MMFAST_HD inline void solve(const Team& team, const Chain& chain, int K, const Io& io, double* work, int* iwork) {
  const int state_size = io.state ? chain_state_size(chain, K) : 0;
  const Workspace at(K, state_size, work, iwork);
  if (io.norm) each(team, state_size, [&](int i) { at.state[i] = io.state[i]; });
  Norm norm{1.0, 1.0, 0.0};
  double *w = at.w, unit = 1.0;
  const double* G = io.G;
  // the second time for the Gramian changed within its precision, where much depends on it; what the lift alone made must change, too
  for (int pass = 0; pass < 2; ++pass) {
    const bool solved = run_chain(team, chain, K, io, G, pass ? at.state : io.state, at, pass ? 2.0 : 1.0);
    if (!chain.preserve_norm || (!solved && pass == 0)) break;
    int k = 0;
    double scale = 1.0;
    compact(team, io.G, K, io.mask, at.row_index, at.dense, &k, &scale);
    each(team, k, [&](int i) { w[i] = solved ? io.w[at.row_index[i]] : 0.0; });  // the changed Gramian may have left nothing
    if (pass == 0) unit = weight_unit(team, k, w);
    each(team, k, [&](int i) { w[i] /= unit; });
    if (!io.norm) {
      const double factor = norm_factor(team, k, at.dense, w, chain.precision);
      each(team, k, [&](int i) { io.w[at.row_index[i]] = factor * w[i]; });
      break;
    }
    if (pass == 0) {
      norm = norm_of_gramian(team, k, at.dense, w, chain.precision);
      norm.factor /= unit;
      if (norm.noise == 0.0) break;
      if (!chain_reads_gramian(chain)) {
        norm.noise = 0.0;
        break;
      }
      each(team, K, [&](int i) { at.kept_w[i] = io.w[i]; });
      each(team, K * K, [&](int e) { at.shifted[e] = shifted_entry(io.G, K, e / K, e % K, chain.precision); });
      G = at.shifted;
    } else {
      each(team, k, [&](int i) { w[i] -= at.kept_w[at.row_index[i]] / unit; });
      norm.noise = sqrt(scale) * unit * norm_noise(team, k, at.dense, w, chain.precision);
    }
  }
  if (G != io.G) each(team, K, [&](int i) { io.w[i] = at.kept_w[i]; });
  if (io.norm && team.rank() == 0) *io.norm = norm;
  team.sync();
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
