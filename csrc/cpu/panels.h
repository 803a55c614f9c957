// The Gramian of many rows: tiles of pairs from packed copies of a stretch of the rows, while the next stretch is fetched and packed.
// What is summed in which order is told in gram.h; packing and tiles do not change it.
#pragma once

#include <type_traits>

#include "../gramian.h"
#include "arena.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kPanel = 64;  // rows packed at once, or twice as many of two panels
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileCols = 4;  // 24 accumulators, 6 rows and a column in 32 registers
#else
constexpr int kTileRows = 3, kTileCols = 4;  // 12 accumulators, 3 rows and a column in 16 registers
#endif
constexpr int kTileUnroll = 4;  // steps that a tile's loop takes at once

// From one packed row to the next: a register of padding lets rows of odd and even number begin in different halves of a cache line,
// for two loads of the same half would wait for each other.
template <class V>
constexpr int kPackedRow = (kSubSteps * V::parts + 1) * V::width;

// Where the rows of a stretch stand: elements from one step, or part of all steps, to the next. A part of a tile prefetches one of `pieces` pieces of a
// row, of the row `ahead` behind its own.
// Packed: part after part; a row has to be there when it is copied.
template <class V>
struct PackedRows {
  static constexpr int step_stride = V::width, part_stride = kSubSteps * V::width, pieces = V::parts == 1 ? 1 : 4, ahead = 2;
  const typename V::Acc* first;
  MMFAST_INLINE PackedRows from(int i) const { return {first + i * kPackedRow<V>}; }
  MMFAST_INLINE const typename V::Acc* operator[](int i) const { return first + i * kPackedRow<V>; }
};
// Few enough to be read where they are, and to be fetched as fast as they are read.
template <class V>
struct InPlaceRows {
  static constexpr int step_stride = V::width * V::parts, part_stride = V::width, pieces = 1, ahead = 0;
  const typename V::Acc* const* rows;
  int64_t begin;
  MMFAST_INLINE InPlaceRows from(int i) const { return {rows + i, begin}; }
  MMFAST_INLINE const typename V::Acc* operator[](int i) const { return rows[i] + begin; }
};
constexpr int kMaxInPlaceRows = 10;

// What a tile does besides, while the multipliers are busy: prefetches a piece of a row per part and, if it packs, copies a row.
template <class T>
struct SideWork {
  const T *prefetch[Vec<T>::parts], *pack_from;
  Acc<T>* pack_to = nullptr;
};

// The pairs of R rows with C others, or with themselves when C is 0; lanes of the pairs stand one after the other.
// The first chain of a chunk starts the lane sums, the others add to them.
template <class T, int R, int C, bool packs, class Rows>
void tile(Rows rows, Rows columns, int iterations, bool first, const SideWork<T>& side, Acc<T>* lanes) {
  using V = Vec<T>;
  constexpr int L = kLanes<T>, P = C ? R * C : R * (R + 1) / 2, stride = Rows::step_stride;
  const Acc<T>*a[R], *b[C ? C : 1];
  for (int i = 0; i < R; ++i) a[i] = rows[i];
  for (int j = 0; j < C; ++j) b[j] = columns[j];
  Acc<T>* pack_to = side.pack_to;
  for (int part = 0; part < V::parts; ++part, lanes += V::width) {
    typename V::Reg acc[P];
#pragma GCC unroll 32
    for (int e = 0; e < P; ++e) acc[e] = V::zero();
    const T *prefetch = side.prefetch[part], *pack_from = side.pack_from + part * V::width;
    const int64_t begin = part * Rows::part_stride, end = begin + static_cast<int64_t>(iterations) * (kTileUnroll * stride);
    for (int64_t base = begin; base < end; base += kTileUnroll * stride) {
#pragma GCC unroll 4
      for (int u = 0; u < kTileUnroll; ++u) {
        const int64_t t = base + u * stride;
        if (u % Rows::pieces == 0) __builtin_prefetch(prefetch + u / Rows::pieces * L, 0, 2);
        if constexpr (packs) V::store(pack_to + u * V::width, V::load(pack_from + u * L));
        typename V::Reg x[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) x[i] = V::load(a[i] + t);
        if constexpr (C == 0) {
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = i; j < R; ++j) {
              const int e = i * R - i * (i - 1) / 2 + (j - i);
              acc[e] = V::fma(x[i], x[j], acc[e]);
            }
        } else {
#pragma GCC unroll 8
          for (int j = 0; j < C; ++j) {
            const typename V::Reg y = V::load(b[j] + t);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) acc[i * C + j] = V::fma(x[i], y, acc[i * C + j]);
          }
        }
      }
      prefetch += kTileUnroll / Rows::pieces * L;
      if constexpr (packs) {
        pack_from += kTileUnroll * L;
        pack_to += kTileUnroll * V::width;
      }
    }
#pragma GCC unroll 32
    for (int e = 0; e < P; ++e) V::store(lanes + e * L, first ? acc[e] : V::add(V::load(lanes + e * L), acc[e]));
  }
}

// The tiles of all shapes, [R - 1][C][packs].
template <class T, class Rows>
struct TileKernels {
  using Kernel = void (*)(Rows, Rows, int, bool, const SideWork<T>&, Acc<T>*);
  Kernel kernel[kTileRows][kTileCols + 1][2];
  template <int R, int C>
  constexpr void set() {
    kernel[R - 1][C][0] = tile<T, R, C, false, Rows>;
    kernel[R - 1][C][1] = tile<T, R, C, true, Rows>;
    if constexpr (C < kTileCols) set<R, C + 1>();
    else if constexpr (R < kTileRows) set<R + 1, 0>();
  }
  constexpr TileKernels() : kernel() { set<1, 0>(); }
};
template <class T, class Rows>
constexpr TileKernels<T, Rows> kTileKernels;

// A tile of a stretch: its first row and column among the stretch's rows, its shape, where its lanes begin, and the first piece it
// prefetches and the first row it packs of the next stretch; those of the tile behind it are where it stops.
struct Tile {
  int row, column, R, C, lanes, prefetch, pack;
};
constexpr int kMaxTiles = (kPanel / kTileRows + 1) * (kPanel / kTileCols + 1);

// Cuts the pairs of rows 0..na-1 with themselves (nb = 0), or with the nb rows behind them, into tiles. Two strips of rows take turns
// at the columns, so that those come half as often from the second cache.
inline int cut_tiles(int na, int nb, int L, Tile* tiles) {
  int count = 0, lanes = 0;
  auto add = [&](int row, int column, int R, int C) {
    tiles[count++] = {row, column, R, C, lanes, 0, 0};
    lanes += (C ? R * C : R * (R + 1) / 2) * L;
  };
  auto rows_of = [](int i, int bottom) { return bottom - i < kTileRows ? bottom - i : kTileRows; };
  auto across = [&](int top, int bottom, int left, int right) {
    for (int j = left, C; j < right; j += C) {
      const int tiles_left = (right - j + kTileCols - 1) / kTileCols;
      C = (right - j + tiles_left - 1) / tiles_left;  // of even width: a tile of one column is slow
      for (int i = top; i < bottom; i += kTileRows) add(i, j, rows_of(i, bottom), C);
    }
  };
  for (int top = 0; top < na; top += 2 * kTileRows) {
    const int bottom = na - top < 2 * kTileRows ? na : top + 2 * kTileRows;
    for (int i = top; nb == 0 && i < bottom; i += kTileRows) {
      const int R = rows_of(i, bottom);
      add(i, i, R, 0);
      across(i, i + R, i + R, bottom);
    }
    across(top, bottom, nb ? na : bottom, na + nb);
  }
  return count;
}

// Shares out what is to be done for the next stretch.
inline void assign_side_work(Tile* tiles, int count, int prefetches, int packs) {
  for (int i = 0; i <= count; ++i) {
    tiles[i].prefetch = prefetches * i / count;
    tiles[i].pack = packs * i / count;
  }
}

// The parts of a row of `length` elements, and zeros up to a whole iteration behind its end.
template <class T>
inline void pack_row(const T* row, int64_t length, Acc<T>* out) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>, kIteration = kTileUnroll * L;
  const int64_t padded = (length + kIteration - 1) / kIteration * kIteration;
  for (int part = 0; part < V::parts; ++part, out += kSubSteps * V::width) {
    Acc<T>* to = out;
    int64_t t = part * V::width;
    for (; t + V::width <= length; t += L, to += V::width) V::store(to, V::load(row + t));
    for (; t < padded; t += L)
      for (int lane = 0; lane < V::width; ++lane, ++to) *to = t + lane < length ? load_acc(row + t + lane) : 0;
  }
}

// The stretch behind the one that is worked off.
template <class T>
struct NextStretch {
  const T* rows[2 * kPanel + PackedRows<Vec<T>>::ahead];  // its rows, from where it begins; then the first ones of the stretch behind it
  int count, packs;                              // how many rows, and how many of them are to be packed
  bool whole;                                    // both stretches have all their steps: a tile can copy a row
  int64_t length;
  Acc<T>* packed;
};

template <class T, class Rows>
inline void run_tiles(const Tile* tiles, int count, Rows rows, int steps, bool first, const NextStretch<T>& next, Acc<T>* lanes) {
  using V = Vec<T>;
  const int iterations = (steps + kTileUnroll - 1) / kTileUnroll;
  constexpr unsigned kPiece = kSubSteps * kLanes<T> / Rows::pieces;
  auto piece = [&](unsigned i) { return next.rows[Rows::ahead + i / Rows::pieces] + i % Rows::pieces * kPiece; };
  for (const Tile* t = tiles; t < tiles + count; ++t) {
    SideWork<T> side;
    int prefetch = t->prefetch, pack = t->pack;
    for (int part = 0; part < V::parts; ++part) side.prefetch[part] = piece(prefetch < t[1].prefetch ? prefetch++ : 0);
    for (; prefetch < t[1].prefetch; ++prefetch)  // more than its loop has room for
      for (unsigned e = 0; e < kPiece; e += kLanes<T>) __builtin_prefetch(piece(prefetch) + e, 0, 2);
    side.pack_from = next.rows[pack];
    if (pack < t[1].pack && next.whole) side.pack_to = next.packed + pack++ * kPackedRow<V>;
    for (; pack < t[1].pack; ++pack) pack_row(next.rows[pack], next.length, next.packed + pack * kPackedRow<V>);
    kTileKernels<T, Rows>.kernel[t->R - 1][t->C][side.pack_to != nullptr](rows.from(t->row), rows.from(t->column), iterations, first, side, lanes + t->lanes);
  }
}

// Adds the lanes of a whole chunk to its pairs: a tile's row i is row pa + i of all, its column j is pb + j.
template <class A>
inline void fold_tiles(const Tile* tiles, int count, int k, int pa, int pb, const A* lanes, double* out) {
  for (const Tile* t = tiles; t < tiles + count; ++t)
    for (int i = 0; i < t->R; ++i)
      for (int j = t->C ? 0 : i; j < (t->C ? t->C : t->R); ++j, lanes += kLanes<A>)
        out[pair_index(k, pa + t->row + i, pb + t->column + j)] += reduce_lanes(lanes);
}

// One stretch of one pair of panels: the order in which a range of chunks is worked off.
struct Stretch {
  int64_t begin, end, chunk;
  int pa, pb;
};

// Adds the Gramians of chunks [first, last) of k rows of n elements, in order; slot_of(chunk) says where to.
template <class T, class SlotOf>
inline void gram_panels(const T* const* rows, int k, int64_t n, int64_t first, int64_t last, const SlotOf& slot_of) {
  using V = Vec<T>;
  using A = Acc<T>;
  constexpr int L = kLanes<T>, kStretch = kSubSteps * L;
  constexpr bool readable = std::is_same_v<T, A>;  // without a conversion
  Arena arena;
  const int packed_rows = k < 2 * kPanel ? k : 2 * kPanel;
  A* lanes = arena.take<A>(k <= kPanel ? pair_count(k) * L : kPanel * kPanel * L);
  A* packed[2] = {arena.take<A>(packed_rows * kPackedRow<V>), arena.take<A>(packed_rows * kPackedRow<V>)};
  Tile* tiles = arena.take<Tile>(kMaxTiles + 1);

  auto end_of = [&](int64_t chunk) { return (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n; };
  auto stretch = [&](int64_t begin, int64_t chunk, int pa, int pb) {
    return Stretch{begin, end_of(chunk) - begin < kStretch ? end_of(chunk) : begin + kStretch, chunk, pa, pb};
  };
  auto stretch_after = [&](const Stretch& s) {
    if (s.end < end_of(s.chunk)) return stretch(s.end, s.chunk, s.pa, s.pb);
    if (s.pb + kPanel < k) return stretch(s.chunk * kChunk, s.chunk, s.pa, s.pb + kPanel);
    if (s.pa + kPanel < k) return stretch(s.chunk * kChunk, s.chunk, s.pa + kPanel, s.pa + kPanel);
    if (s.chunk + 1 < last) return stretch((s.chunk + 1) * kChunk, s.chunk + 1, 0, 0);
    return Stretch{0, 0, last, 0, 0};
  };
  auto rows_of = [&](int panel) { return k - panel < kPanel ? k - panel : kPanel; };
  auto whole = [&](const Stretch& s) { return s.end - s.begin == kStretch; };
  auto in_place = [&](const Stretch& s) { return readable && k <= kMaxInPlaceRows && whole(s); };
  auto describe = [&](const Stretch& s, A* to) {
    NextStretch<T> next;
    const int na = rows_of(s.pa), nb = s.pa == s.pb ? 0 : rows_of(s.pb);
    for (int i = 0; i < na; ++i) next.rows[i] = rows[s.pa + i] + s.begin;
    for (int j = 0; j < nb; ++j) next.rows[na + j] = rows[s.pb + j] + s.begin;
    const Stretch upcoming = stretch_after(s);
    for (int i = 0; i < PackedRows<V>::ahead; ++i) next.rows[na + nb + i] = rows[upcoming.pa + (upcoming.pa + i < k ? i : 0)] + upcoming.begin;
    next.count = s.chunk == last ? 0 : na + nb;
    next.packs = in_place(s) ? 0 : next.count;
    next.length = s.end - s.begin;
    next.packed = to;
    return next;
  };

  Stretch current = stretch(first * kChunk, first, 0, 0);
  const NextStretch<T> start = describe(current, packed[0]);
  for (int i = 0; i < start.packs; ++i) pack_row(start.rows[i], start.length, packed[0] + i * kPackedRow<V>);
  int buffer = 0, count = 0, tiled_a = 0, tiled_b = 0, prefetches = -1, packs = -1;
  double* slot = nullptr;
  while (current.chunk < last) {
    const Stretch upcoming = stretch_after(current);
    const int na = rows_of(current.pa), nb = current.pa == current.pb ? 0 : rows_of(current.pb), steps = static_cast<int>((current.end - current.begin + L - 1) / L);
    const bool first_of_chunk = current.begin == current.chunk * kChunk, reads_rows = in_place(current);
    NextStretch<T> next = describe(upcoming, packed[1 - buffer]);
    next.whole = whole(current) && whole(upcoming);
    const int pieces = next.count * (reads_rows ? InPlaceRows<V>::pieces : PackedRows<V>::pieces);
    const bool recut = na != tiled_a || nb != tiled_b;
    if (recut) count = cut_tiles(tiled_a = na, tiled_b = nb, L, tiles);
    if (recut || pieces != prefetches || next.packs != packs) assign_side_work(tiles, count, prefetches = pieces, packs = next.packs);
    if constexpr (readable)
      if (reads_rows) run_tiles(tiles, count, InPlaceRows<V>{rows, current.begin}, steps, first_of_chunk, next, lanes);
    if (!reads_rows) run_tiles(tiles, count, PackedRows<V>{packed[buffer]}, steps, first_of_chunk, next, lanes);
    if (current.end == end_of(current.chunk)) {
      if (current.pa == 0 && current.pb == 0) slot = slot_of(current.chunk);
      fold_tiles(tiles, count, k, current.pa, nb ? current.pb - na : current.pa, lanes, slot);
    }
    current = upcoming;
    buffer = 1 - buffer;
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
