// The Gramian of the gradients of K linear branches, from two small ones: <g_a, g_b> = <delta_a' delta_b, W_a W_b'>.
#pragma once

#include "columns.h"
#include "resolve.h"

namespace mmfast {
namespace MMFAST_ISA {

// G [K, K] from delta' delta and W W'. A branch without delta is not read in W W': its weights may be anything.
inline void fold_heads(const Heads& h, double precision, const double* delta_products, const double* weight_products, double* G) {
  const int64_t stride = products_stride(h.outputs), K = h.K;
  Arena arena;
  double* row = arena.take<double>(h.outputs);
  bool* nonzero = arena.take<bool>(K);
  int64_t begin = 0;
  for (int64_t a = 0; a < K; begin += h.sizes[a++]) {
    nonzero[a] = false;
    for (int64_t i = begin; i < begin + h.sizes[a]; ++i) nonzero[a] |= !(delta_products[i * stride + i] == 0.0);
  }
  begin = 0;
  for (int64_t a = 0; a < K; begin += h.sizes[a++]) {
    const int64_t end = begin + h.sizes[a];
    double square = 0.0, length = 0.0;
    for (int64_t j = begin; j < h.outputs; ++j) row[j] = 0.0;
    for (int64_t i = begin; i < end && nonzero[a]; ++i) {
      const double *d = delta_products + i * stride, *w = weight_products + i * stride;
      row[i] += d[i] * w[i];
      length += std::sqrt(d[i] * w[i]);
      for (int64_t j = i + 1; j < end; ++j) row[j] += 2.0 * (d[j] * w[j]);
      for (int64_t j = end; j < h.outputs; ++j) row[j] += d[j] * w[j];
    }
    for (int64_t j = begin; j < end; ++j) square += row[j];
    G[a * K + a] = bounded_square(square, length, precision);
    for (int64_t b = a + 1, j = end; b < K; ++b) {
      double product = 0.0;
      for (const int64_t stop = j + h.sizes[b]; j < stop; ++j) product += row[j];
      G[a * K + b] = G[b * K + a] = nonzero[a] && nonzero[b] ? product : 0.0;
    }
  }
}

// Squared lengths of the plain and of the weighted sum of the branches' gradients, from both Gramians in double precision; total is [3].
template <class D, class W>
inline void lengths_of_heads(const Pool& pool, const Heads& h, const D* delta, int64_t rows, const W* weight, const double* w, double* total) {
  const int64_t O = h.outputs, K = h.K, size = products_size(O);
  Arena arena;
  double *deltas = arena.take<double>(rows * O), *weights = arena.take<double>(O * h.inputs);
  double *delta_products = arena.take<double>(size), *weight_products = arena.take<double>(size), *G = arena.take<double>(K * K);
  for (int64_t e = 0; e < rows * O; ++e) deltas[e] = static_cast<double>(load_acc(delta + e));
  for (int64_t e = 0; e < O * h.inputs; ++e) weights[e] = static_cast<double>(load_acc(weight + e));
  column_products<double>(pool, {deltas, rows, O, O, 1}, delta_products);
  column_products<double>(pool, {weights, h.inputs, O, 1, h.inputs}, weight_products);
  fold_heads(h, 0.0, delta_products, weight_products, G);
  total[0] = total[2] = 0.0;
  for (int64_t e = 0; e < K * K; ++e) total[0] += G[e], total[2] += w[e / K] * G[e] * w[e % K];
  total[0] = std::fmax(total[0], 0.0), total[2] = std::fmax(total[2], 0.0);
}

template <class T>
inline void heads_typed(const Pool& pool, const Heads& h, const SolveArgs& args, Factor<T>* left, Factor<T>* right) {
  using A = Acc<T>;
  using F = Factor<T>;
  const int64_t O = h.outputs, K = h.K, rows = h.batch * h.rows, size = products_size(O);
  const T *delta = static_cast<const T*>(h.delta), *weight = static_cast<const T*>(h.weight);
  Arena arena;
  int* head_of = arena.take<int>(O);
  for (int64_t a = 0, o = 0; a < K; ++a)
    for (const int64_t stop = o + h.sizes[a]; o < stop; ++o) head_of[o] = static_cast<int>(a);
  if (left)
    parallel_for(pool, rows, rows * O, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const bool* mask = h.mask ? h.mask + r / h.rows * h.mask_stride : nullptr;
        for (int64_t o = 0; o < O; ++o)  // what a mask hides is not read, not even a NaN
          store_acc(left + r * O + o, !mask || mask[head_of[o]] ? load_acc(delta + r * O + o) : A(0));
      }
    });
  const F* factor = left ? left : static_cast<const F*>(h.delta);
  double* G = const_cast<double*>(args.G);
  double* weight_products = arena.take<double>(size);
  column_products<T>(pool, {weight, h.inputs, O, 1, h.inputs}, weight_products);
  A* scale = arena.take<A>(O);
  if (h.per == Per::sample) {
    parallel_for(pool, h.batch, h.batch * (h.rows + 1) * O * O, [&](int64_t first, int64_t last) {
      Arena scratch;
      double* delta_products = scratch.take<double>(size);
      for (int64_t b = first; b < last; ++b) {
        column_products<F>(kSerial, {factor + b * h.rows * O, h.rows, O, O, 1}, delta_products);
        fold_heads(h, args.precision, delta_products, weight_products, G + b * args.G_stride);
        double* w = args.w + b * args.w_stride;
        Norm norm;
        solve_range(args, b, b + 1, &norm);
        if (args.preserve_norm)
          keep_norm(h.K, norm, [&](double* total) { lengths_of_heads(kSerial, h, factor + b * h.rows * O, h.rows, weight, w, total); }, w);
        for (F* row = left + b * h.rows * O; row < left + (b + 1) * h.rows * O; row += O)
          for (int64_t o = 0; o < O; ++o) store_acc(row + o, load_acc(row + o) * static_cast<A>(w[head_of[o]]));
      }
    });
    for (int64_t o = 0; o < O; ++o) {
      scale[o] = 0;
      for (int64_t b = 0; b < h.batch && scale[o] == 0; ++b) scale[o] = !(args.w[b * args.w_stride + head_of[o]] == 0.0);
    }
  } else {
    double* delta_products = arena.take<double>(size);
    if (h.per == Per::batch_sum) {
      A* sums = arena.take<A>(h.rows * O);
      const void* all[1] = {factor};
      const int row_index = 0;
      batch_sums<F>(pool, {h.dtype, all, 1, &row_index, 1, h.batch, h.rows * O, h.per, nullptr, 0}, sums);
      column_products<A>(pool, {sums, h.rows, O, O, 1}, delta_products);
    } else {
      column_products<F>(pool, {factor, rows, O, O, 1}, delta_products);
    }
    fold_heads(h, args.precision, delta_products, weight_products, G);
    Norm norm;
    solve_range(args, 0, 1, &norm);
    if (args.preserve_norm)
      keep_norm(h.K, norm, [&](double* total) {
        if (h.per != Per::batch_sum) return lengths_of_heads(pool, h, factor, rows, weight, args.w, total);
        double* sums = arena.take<double>(h.rows * O);
        const void* all[1] = {factor};
        const int row_index = 0;
        batch_sums<F>(pool, {h.dtype, all, 1, &row_index, 1, h.batch, h.rows * O, h.per, nullptr, 0}, sums);
        lengths_of_heads(pool, h, sums, h.rows, weight, args.w, total);
      }, args.w);
    for (int64_t o = 0; o < O; ++o) scale[o] = static_cast<A>(args.w[head_of[o]]);
  }
  for (int64_t o = 0; o < O; ++o) {
    const T* from = weight + o * h.inputs;
    F* to = right + o * h.inputs;
    if (scale[o] == 0)  // a branch without weight may hold anything
      for (int64_t i = 0; i < h.inputs; ++i) store_acc(to + i, A(0) * scale[o]);
    else
      for (int64_t i = 0; i < h.inputs; ++i) store_acc(to + i, load_acc(from + i) * scale[o]);
  }
}

inline void heads(const Pool& pool, const Heads& h, const SolveArgs& args, void* left, void* right) {
  with_type(h.dtype, [&](auto tag) {
    using T = decltype(tag);
    heads_typed<T>(pool, h, args, static_cast<Factor<T>*>(left), static_cast<Factor<T>*>(right));
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
