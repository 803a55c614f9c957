// Which tiles of pairs the Gramian of k rows is made of: a triangle on the diagonal for every eight rows, and what is right of them.
#pragma once

#include <type_traits>

#include "exec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kTileRows = 8, kTileCols = 4;

// Tiles right of the triangle of rows a..
MMFAST_HD inline int tiles_right_of(int k, int a) { return k > a + kTileRows ? (k - a - kTileRows + kTileCols - 1) / kTileCols : 0; }

// The first row and column of a tile.
struct TileOrigin {
  int row, column;
};

template <int R, int C>
MMFAST_HD inline TileOrigin tile_origin(int k, int tile) {
  if (C == 0) return {tile * R, tile * R};
  int row = 0;
  for (; tile >= tiles_right_of(k, row); row += kTileRows) tile -= tiles_right_of(k, row);
  return {row, row + R + tile * C};
}

// f(rows, columns, number of tiles) for the shapes that cover all pairs, 0 columns for a triangle; few rows take a smaller one.
template <class F>
inline void for_tile_shapes(int k, F f) {
  using std::integral_constant;
  const integral_constant<int, 0> triangle;
  const integral_constant<int, kTileRows> tile_rows;
  if (k <= 2) return f(integral_constant<int, 2>{}, triangle, 1);
  if (k <= 4) return f(integral_constant<int, 4>{}, triangle, 1);
  f(tile_rows, triangle, (k + kTileRows - 1) / kTileRows);
  int tiles_right = 0;
  for (int a = 0; a < k; a += kTileRows) tiles_right += tiles_right_of(k, a);
  if (tiles_right) f(tile_rows, integral_constant<int, kTileCols>{}, tiles_right);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
