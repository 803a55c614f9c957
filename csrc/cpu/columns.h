// Inner products of all pairs of columns of a matrix. kChain rows at a time are summed in one chain of fused multiply-adds per pair, in the
// precision of the accumulator; chains are added in double, in order. Threads share out pairs, not rows, so none of them changes a bit.
#pragma once

#include "arena.h"
#include "pool.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kChain = 128;
constexpr int64_t kPackedNumbers = 1 << 18;  // of a stretch of rows, held at once
constexpr int kTileLeft = 4, kTileRight = 3; // a tile: 4 columns with up to 3 registers of others, 12 accumulators in 16 registers
constexpr int kUnit = 4 * kTileLeft;         // columns of the left that a thread takes at once

// From one row of products to the next: whole registers of every instruction set.
inline int64_t products_stride(int64_t columns) { return (columns + 15) / 16 * 16; }
inline int64_t products_size(int64_t columns) { return products_stride(columns) * products_stride(columns); }

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, down, right;  // elements from one row to the next, from one column to the next
};

// Columns stand in panels of one register, row after row: the products of 4 columns with C panels.
template <class V, int C>
inline void column_tile(const typename V::Acc* left, const typename V::Acc* right, int64_t panel, int64_t n, bool first, double* out,
                        int64_t stride) {
  using Acc = typename V::Acc;
  typename V::Reg acc[kTileLeft * C];
#pragma GCC unroll 16
  for (int e = 0; e < kTileLeft * C; ++e) acc[e] = V::zero();
  for (int64_t t = 0; t < n * V::width; t += V::width) {
    typename V::Reg y[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = V::load(right + c * panel + t);
#pragma GCC unroll 4
    for (int r = 0; r < kTileLeft; ++r) {
      const typename V::Reg x = V::set(left[t + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r * C + c] = V::fma(x, y[c], acc[r * C + c]);
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < kTileLeft * C; ++e) {
    alignas(64) Acc lanes[V::width];
    V::store(lanes, acc[e]);
    double* to = out + e / C * stride + e % C * V::width;
    for (int l = 0; l < V::width; ++l) to[l] = first ? lanes[l] : to[l] + lanes[l];
  }
}

// Rows [begin, end) of a matrix into panels, zeros behind the last column; `packed` is where row `from` stands.
template <class T>
inline void pack_columns(const Matrix<T>& x, int64_t begin, int64_t end, int64_t from, int64_t panel, typename Stored<T>::Vec::Acc* packed) {
  using V = typename Stored<T>::Vec;
  for (int64_t row = begin; row < end; ++row) {
    const T* at = x.data + row * x.down;
    auto* to = packed + (row - from) * V::width;
    int64_t j = 0;
    for (; x.right == 1 && j + V::width <= x.columns; j += V::width, to += panel) V::store(to, V::load(at + j));
    for (; j < x.columns; j += V::width, to += panel)
      for (int l = 0; l < V::width; ++l) {
        to[l] = 0;
        if (j + l < x.columns) read(at + (j + l) * x.right, to + l);
      }
  }
}

// out[i * products_stride(columns) + j] for i <= j; below the diagonal it is undefined.
template <class T>
inline void column_products(const Pool& pool, const Matrix<T>& x, double* out) {
  using V = typename Stored<T>::Vec;
  constexpr int W = V::width;
  const int64_t panels = (x.columns + W - 1) / W, groups = (panels + kTileRight - 1) / kTileRight, stride = products_stride(x.columns);
  const int64_t fitting = kPackedNumbers / (panels * W) / kChain * kChain, most = fitting < kChain ? kChain : fitting;
  Arena arena;
  auto* packed = arena.take<typename V::Acc>(panels * W * (x.rows < most ? x.rows : most));
  auto group = [&](int64_t g) { return g * panels / groups; };
  auto units_of = [&](int64_t g) { return (group(g + 1) * W + kUnit - 1) / kUnit; };
  int64_t units = 0;
  for (int64_t g = 0; g < groups; ++g) units += units_of(g);
  for (int64_t from = 0; from == 0 || from < x.rows; from += most) {
    const int64_t n = x.rows - from < most ? x.rows - from : most, panel = n * W, blocks = (n + kChain - 1) / kChain;
    run(pool, blocks, n * x.columns, [&](int64_t begin, int64_t end) {
      pack_columns(x, from + begin * kChain, from + (end * kChain < n ? end * kChain : n), from, panel, packed);
    });
    run(pool, units, n * x.columns * x.columns / 16, [&](int64_t begin, int64_t end) {
      int64_t g = 0, unit = begin;
      for (int64_t u = begin; u < end; ++u, ++unit) {
        while (unit >= units_of(g)) unit -= units_of(g++);
        const int64_t last = group(g + 1), stop = last * W < (unit + 1) * kUnit ? last * W : (unit + 1) * kUnit;
        for (int64_t t = 0; t == 0 || t < n; t += kChain) {
          const int64_t rows = n - t < kChain ? n - t : kChain;
          const bool first = from + t == 0;
          for (int64_t i = unit * kUnit; i < stop && i < x.columns; i += kTileLeft) {
            const int64_t v = i / W > group(g) ? i / W : group(g);
            const auto *left = packed + i / W * panel + t * W + i % W, *right = packed + v * panel + t * W;
            double* to = out + i * stride + v * W;
            switch (last - v) {
              case 1: column_tile<V, 1>(left, right, panel, rows, first, to, stride); break;
              case 2: column_tile<V, 2>(left, right, panel, rows, first, to, stride); break;
              default: column_tile<V, kTileRight>(left, right, panel, rows, first, to, stride);
            }
          }
        }
      }
    });
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
