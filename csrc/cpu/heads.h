// The Gramian of the gradients of K linear branches, from two small ones: <g_a, g_b> = <delta_a' delta_b, W_a W_b'>.
#pragma once

#include <type_traits>

#include "columns.h"
#include "resolve.h"

namespace mmfast {
namespace MMFAST_ISA {

// G [K, K] from delta' delta and W W'. A branch that sends nothing is not read in W W': its weights may be anything.
inline void fold_heads(const Heads& h, double precision, const double* deltas, const double* weights, double* G) {
  const int64_t stride = products_stride(h.outputs), K = h.K;
  Arena arena;
  double* row = arena.take<double>(h.outputs);
  bool* live = arena.take<bool>(K);
  int64_t begin = 0;
  for (int64_t a = 0; a < K; begin += h.sizes[a++]) {
    live[a] = false;
    for (int64_t i = begin; i < begin + h.sizes[a]; ++i) live[a] |= !(deltas[i * stride + i] == 0.0);
  }
  begin = 0;
  for (int64_t a = 0; a < K; begin += h.sizes[a++]) {
    const int64_t end = begin + h.sizes[a];
    double square = 0.0, length = 0.0;
    for (int64_t j = begin; j < h.outputs; ++j) row[j] = 0.0;
    for (int64_t i = begin; i < end && live[a]; ++i) {
      const double *d = deltas + i * stride, *w = weights + i * stride;
      row[i] += d[i] * w[i];
      length += std::sqrt(d[i] * w[i]);
      for (int64_t j = i + 1; j < end; ++j) row[j] += 2.0 * (d[j] * w[j]);
      for (int64_t j = end; j < h.outputs; ++j) row[j] += d[j] * w[j];
    }
    for (int64_t j = begin; j < end; ++j) square += row[j];
    // where the parts of a branch's gradient cancel, rounding must make it neither missing nor negative
    const double lift = precision * length * length - square;
    G[a * K + a] = !(lift <= 0.0) ? square + lift : square;
    for (int64_t b = a + 1, j = end; b < K; ++b) {
      double product = 0.0;
      for (const int64_t stop = j + h.sizes[b]; j < stop; ++j) product += row[j];
      G[a * K + b] = G[b * K + a] = live[a] && live[b] ? product : 0.0;
    }
  }
}

template <class T, class P>
inline void heads_typed(const Pool& pool, const Heads& h, const SolveArgs& args, P* left, P* right) {
  using Acc = typename Stored<T>::Vec::Acc;
  const int64_t O = h.outputs, K = h.K, rows = h.batch * h.rows, size = products_size(O);
  const T *delta = static_cast<const T*>(h.delta), *weight = static_cast<const T*>(h.weight);
  Arena arena;
  int* head_of = arena.take<int>(O);
  for (int64_t a = 0, o = 0; a < K; ++a)
    for (const int64_t stop = o + h.sizes[a]; o < stop; ++o) head_of[o] = static_cast<int>(a);
  if (left)
    run(pool, rows, rows * O, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const bool* mask = h.mask ? h.mask + r / h.rows * h.mask_stride : nullptr;
        for (int64_t o = 0; o < O; ++o) {
          Acc x = 0;
          if (!mask || mask[head_of[o]]) read(delta + r * O + o, &x);  // what a mask hides is not read, not even a NaN
          write(left + r * O + o, x);
        }
      }
    });
  const P* sent = left ? left : static_cast<const P*>(h.delta);
  double* G = const_cast<double*>(args.G);
  double* weights = arena.take<double>(size);
  column_products<T>(pool, {weight, h.inputs, O, 1, h.inputs}, weights);
  Acc* scale = arena.take<Acc>(O);
  if (h.per == Per::sample) {
    run(pool, h.batch, h.batch * (h.rows + 1) * O * O, [&](int64_t first, int64_t last) {
      Arena own;
      double* deltas = own.take<double>(size);
      for (int64_t b = first; b < last; ++b) {
        column_products<P>(kSerial, {sent + b * h.rows * O, h.rows, O, O, 1}, deltas);
        fold_heads(h, args.precision, deltas, weights, G + b * args.G_stride);
        solve_range(args, b, b + 1);
        for (P* at = left + b * h.rows * O; at < left + (b + 1) * h.rows * O; at += O)
          for (int64_t o = 0; o < O; ++o) {
            Acc x;
            read(at + o, &x);
            write(at + o, x * static_cast<Acc>(args.w[b * args.w_stride + head_of[o]]));
          }
      }
    });
    for (int64_t o = 0; o < O; ++o) {
      scale[o] = 0;
      for (int64_t b = 0; b < h.batch && scale[o] == 0; ++b) scale[o] = !(args.w[b * args.w_stride + head_of[o]] == 0.0);
    }
  } else {
    double* deltas = arena.take<double>(size);
    if (h.per == Per::batch_sum) {
      Acc* sums = arena.take<Acc>(h.rows * O);
      const void* all[1] = {sent};
      const int place = 0;
      batch_sums<P>(pool, {h.dtype, all, 1, &place, 1, h.batch, h.rows * O, h.per, nullptr, 0}, sums);
      column_products<Acc>(pool, {sums, h.rows, O, O, 1}, deltas);
    } else {
      column_products<P>(pool, {sent, rows, O, O, 1}, deltas);
    }
    fold_heads(h, args.precision, deltas, weights, G);
    solve_range(args, 0, 1);
    for (int64_t o = 0; o < O; ++o) scale[o] = static_cast<Acc>(args.w[head_of[o]]);
  }
  for (int64_t o = 0; o < O; ++o)
    for (int64_t i = o * h.inputs; i < (o + 1) * h.inputs; ++i) {
      Acc x = 0;
      if (scale[o] != 0) read(weight + i, &x);  // a branch without weight may hold anything
      write(right + i, x * scale[o]);
    }
}

inline void heads(const Pool& pool, const Heads& h, const SolveArgs& args, void* left, void* right) {
  with_type(h.dtype, [&](auto zero) {
    using T = decltype(zero);
    // what the last product takes: float16 is widened, for scaled rows could leave its range though their sum does not
    using P = std::conditional_t<std::is_same_v<T, Half>, float, T>;
    heads_typed<T, P>(pool, h, args, static_cast<P*>(left), static_cast<P*>(right));
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
