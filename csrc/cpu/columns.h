// Inner products of all pairs of columns of a matrix. kChainRows rows at a time are summed in one chain of fused multiply-adds per pair, in the
// precision of the accumulator; chains are added in double, in order. Threads share out pairs, not rows, so none of them changes a bit.
#pragma once

#include "../gramian.h"
#include "arena.h"
#include "pool.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int64_t kPackedElements = 1 << 18;  // of a stretch of rows, held at once
constexpr int kTileLeft = 4, kTileRight = 3;  // a tile: 4 columns with up to 3 registers of others, 12 accumulators in 16 registers
constexpr int kUnitColumns = 4 * kTileLeft;   // columns of the left that a thread takes at once

// From one row of products to the next: whole registers of every instruction set.
inline int64_t products_stride(int64_t columns) { return (columns + 15) / 16 * 16; }
inline int64_t products_size(int64_t columns) { return products_stride(columns) * products_stride(columns); }

template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;  // elements from one row, or column, to the next
};

// Columns stand in panels of one register, row after row: the products of R columns, of one panel or of two, with C panels.
template <class V, int R, int C>
inline void column_tile(const typename V::Acc* left, const typename V::Acc* right, int64_t panel_stride, int64_t n, bool first, double* out,
                        int64_t stride) {
  typename V::Reg acc[R * C];
#pragma GCC unroll 16
  for (int e = 0; e < R * C; ++e) acc[e] = V::zero();
  for (int64_t t = 0; t < n * V::width; t += V::width) {
    typename V::Reg y[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = V::load(right + c * panel_stride + t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename V::Reg x = V::set(left[r / V::width * panel_stride + t + r % V::width]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r * C + c] = V::fma(x, y[c], acc[r * C + c]);
    }
  }
#pragma GCC unroll 16
  for (int e = 0; e < R * C; ++e) {
    alignas(64) typename V::Acc lanes[V::width];
    V::store(lanes, acc[e]);
    double* to = out + e / C * stride + e % C * V::width;
    for (int l = 0; l < V::width; ++l) to[l] = first ? lanes[l] : to[l] + lanes[l];
  }
}

// Rows [begin, end) of a matrix into panels, anything behind the last column; `packed` is where row `first` stands.
template <class T>
inline void pack_columns(const Matrix<T>& x, int64_t panels, int64_t begin, int64_t end, int64_t first, int64_t panel_stride, Acc<T>* packed) {
  using V = Vec<T>;
  const int64_t behind = (x.rows - 1) * x.row_stride + x.columns;  // of a matrix that stands row by row
  for (int64_t row = begin; row < end; ++row) {
    const T* from_row = x.data + row * x.row_stride;
    auto* to = packed + (row - first) * V::width;
    // a whole register reads what follows the last column, but for the last rows
    const int64_t whole = x.column_stride != 1 ? 0 : row * x.row_stride + panels * V::width <= behind ? panels : x.columns / V::width;
    int64_t j = 0;
    for (; j < whole * V::width; j += V::width, to += panel_stride) V::store(to, V::load(from_row + j));
    for (; j < panels * V::width; j += V::width, to += panel_stride)
      for (int l = 0; l < V::width; ++l) to[l] = j + l < x.columns ? load_acc(from_row + (j + l) * x.column_stride) : 0;
  }
}

// out[i * products_stride(columns) + j] for i <= j; below the diagonal it is undefined.
template <class T>
inline void column_products(const Pool& pool, const Matrix<T>& x, double* out) {
  using V = Vec<T>;
  constexpr int kAlone = V::width < 8 ? kTileLeft : 8;  // with one register of others, where 4 accumulators would wait for each other
  constexpr int W = V::width, kWhole = W < kTileLeft ? kTileLeft : W;  // columns to fill: whole panels that are whole tiles
  const int64_t panels = (x.columns + kWhole - 1) / kWhole * kWhole / W, groups = (panels + kTileRight - 1) / kTileRight, stride = products_stride(x.columns);
  const int64_t fitting = kPackedElements / (panels * W) / kChainRows * kChainRows, max_rows = fitting < kChainRows ? kChainRows : fitting;
  Arena arena;
  auto* packed = arena.take<Acc<T>>(panels * W * (x.rows < max_rows ? x.rows : max_rows));
  auto first_panel = [&](int64_t g) { return g * panels / groups; };
  auto units_of = [&](int64_t g) { return (first_panel(g + 1) * W + kUnitColumns - 1) / kUnitColumns; };
  int64_t units = 0;
  for (int64_t g = 0; g < groups; ++g) units += units_of(g);
  for (int64_t from = 0; from == 0 || from < x.rows; from += max_rows) {
    const int64_t n = x.rows - from < max_rows ? x.rows - from : max_rows, panel_stride = n * W, blocks = (n + kChainRows - 1) / kChainRows;
    parallel_for(pool, blocks, n * x.columns, [&](int64_t begin, int64_t end) {
      pack_columns(x, panels, from + begin * kChainRows, from + (end * kChainRows < n ? end * kChainRows : n), from, panel_stride, packed);
    });
    parallel_for(pool, units, n * x.columns * x.columns / 16, [&](int64_t begin, int64_t end) {
      int64_t g = 0, unit = begin;
      for (int64_t u = begin; u < end; ++u, ++unit) {
        while (unit >= units_of(g)) unit -= units_of(g++);
        const int64_t last = first_panel(g + 1), stop = last * W < (unit + 1) * kUnitColumns ? last * W : (unit + 1) * kUnitColumns;
        for (int64_t t = 0; t == 0 || t < n; t += kChainRows) {
          const int64_t rows = n - t < kChainRows ? n - t : kChainRows;
          const bool first = from + t == 0;
          for (int64_t i = unit * kUnitColumns; i < stop && i < x.columns;) {
            const int64_t v = i / W > first_panel(g) ? i / W : first_panel(g);
            const auto *left = packed + i / W * panel_stride + t * W + i % W, *right = packed + v * panel_stride + t * W;
            double* to = out + i * stride + v * W;
            switch (last - v) {
              case 1: column_tile<V, kAlone, 1>(left, right, panel_stride, rows, first, to, stride); break;
              case 2: column_tile<V, kTileLeft, 2>(left, right, panel_stride, rows, first, to, stride); break;
              default: column_tile<V, kTileLeft, kTileRight>(left, right, panel_stride, rows, first, to, stride);
            }
            i += last - v == 1 ? kAlone : kTileLeft;
          }
        }
      }
    });
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
