// Which tiles of pairs the Gramian of k rows is made of: a triangle on the diagonal for every eight rows, and what is right of them.
#pragma once

#include <type_traits>

#include "exec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kTileRows = 8, kTileCols = 4;

// Tiles right of the triangle of rows a..
MMFAST_HD inline int tiles_right_of(int k, int a) { return k > a + kTileRows ? (k - a - kTileRows + kTileCols - 1) / kTileCols : 0; }

struct Corner {
  int row, column;
};

// Where tile number `tile` begins.
template <int R, int C>
MMFAST_HD inline Corner corner(int k, int tile) {
  if (C == 0) return {tile * R, tile * R};
  int row = 0;
  for (; tile >= tiles_right_of(k, row); row += kTileRows) tile -= tiles_right_of(k, row);
  return {row, row + R + tile * C};
}

// f(rows, columns, number of tiles): the shapes that cover all pairs; few rows take a smaller triangle.
template <class F>
inline void for_tiles(int k, F f) {
  using std::integral_constant;
  const integral_constant<int, 0> diagonal;
  const integral_constant<int, kTileRows> eight;
  if (k <= 2) return f(integral_constant<int, 2>{}, diagonal, 1);
  if (k <= 4) return f(integral_constant<int, 4>{}, diagonal, 1);
  f(eight, diagonal, (k + kTileRows - 1) / kTileRows);
  int right = 0;
  for (int a = 0; a < k; a += kTileRows) right += tiles_right_of(k, a);
  if (right) f(eight, integral_constant<int, kTileCols>{}, right);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
