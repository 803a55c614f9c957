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
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileCols = 4;  // 24 accumulators, 6 rows and a column in 32 registers
#else
constexpr int kTileRows = 3, kTileCols = 4;  // 12 accumulators, 3 rows and a column in 16 registers
#endif
constexpr int kRound = 4;  // steps that a tile's loop takes at once

// From one packed row to the next: a register of padding lets rows of odd and even number begin in different halves of a cache line,
// for two loads of the same half would wait for each other.
template <class V>
constexpr int kPackedRow = (kSubSteps * V::parts + 1) * V::width;

// Where the rows of a stretch stand. A part of a tile fetches one of `pieces` pieces of a row, of the row `ahead` places behind its own.
// Packed: part after part; a row has to be there when it is copied.
template <class V>
struct Packed {
  static constexpr int step = V::width, part = kSubSteps * V::width, pieces = V::parts == 1 ? 1 : 4, ahead = 2;
  const typename V::Acc* first;
  MMFAST_INLINE Packed from(int i) const { return {first + i * kPackedRow<V>}; }
  MMFAST_INLINE const typename V::Acc* operator[](int i) const { return first + i * kPackedRow<V>; }
};
// Few enough to be read where they are, and to be fetched as fast as they are read.
template <class V>
struct InPlace {
  static constexpr int step = V::width * V::parts, part = V::width, pieces = 1, ahead = 0;
  const typename V::Acc* const* rows;
  int64_t begin;
  MMFAST_INLINE InPlace from(int i) const { return {rows + i, begin}; }
  MMFAST_INLINE const typename V::Acc* operator[](int i) const { return rows[i] + begin; }
};
constexpr int kInPlace = 10;

// What a tile does besides, while the multipliers are busy: fetches a piece of a row per part and, if it copies, packs a row.
template <class T>
struct Chore {
  const T *fetch[Stored<T>::Vec::parts], *from;
  typename Stored<T>::Vec::Acc* to = nullptr;
};

// The pairs of R rows with C others, or with themselves when C is 0; lanes of the pairs stand one after the other.
// The first chain of a chunk starts the lane sums, the others add to them.
template <class T, int R, int C, bool copies, class Rows, class V = typename Stored<T>::Vec>
void tile(Rows rows, Rows columns, int rounds, bool first, const Chore<T>& chore, typename V::Acc* lanes) {
  constexpr int L = kStep<T>, P = C ? R * C : R * (R + 1) / 2;
  const typename V::Acc *a[R], *b[C ? C : 1];
  for (int i = 0; i < R; ++i) a[i] = rows[i];
  for (int j = 0; j < C; ++j) b[j] = columns[j];
  typename V::Acc* to = chore.to;
  for (int part = 0; part < V::parts; ++part, lanes += V::width) {
    typename V::Reg acc[P];
#pragma GCC unroll 32
    for (int e = 0; e < P; ++e) acc[e] = V::zero();
    const T *fetch = chore.fetch[part], *from = chore.from + part * V::width;
    const int64_t begin = part * Rows::part, end = begin + static_cast<int64_t>(rounds) * (kRound * Rows::step);
    for (int64_t round = begin; round < end; round += kRound * Rows::step) {
#pragma GCC unroll 4
      for (int u = 0; u < kRound; ++u) {
        const int64_t t = round + u * Rows::step;
        if (u % Rows::pieces == 0) __builtin_prefetch(fetch + u / Rows::pieces * L, 0, 2);
        if constexpr (copies) V::store(to + u * V::width, V::load(from + u * L));
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
      fetch += kRound / Rows::pieces * L;
      if constexpr (copies) {
        from += kRound * L;
        to += kRound * V::width;
      }
    }
#pragma GCC unroll 32
    for (int e = 0; e < P; ++e) V::store(lanes + e * L, first ? acc[e] : V::add(V::load(lanes + e * L), acc[e]));
  }
}

// The tiles of all shapes, [R - 1][C][copies].
template <class T, class Rows>
struct TileRuns {
  using Run = void (*)(Rows, Rows, int, bool, const Chore<T>&, typename Stored<T>::Vec::Acc*);
  Run run[kTileRows][kTileCols + 1][2];
  template <int R, int C>
  constexpr void set() {
    run[R - 1][C][0] = tile<T, R, C, false, Rows>;
    run[R - 1][C][1] = tile<T, R, C, true, Rows>;
    if constexpr (C < kTileCols) set<R, C + 1>();
    else if constexpr (R < kTileRows) set<R + 1, 0>();
  }
  constexpr TileRuns() : run() { set<1, 0>(); }
};
template <class T, class Rows>
constexpr TileRuns<T, Rows> kTileRuns;

// A tile of a stretch: its first row and column among the stretch's rows, its shape, where its lanes begin, and the first piece it
// fetches and the first row it packs of the next stretch; those of the tile behind it are where it stops.
struct Tile {
  int row, column, R, C, lanes, fetch, pack;
};
constexpr int kMaxTiles = (kPanel / kTileRows + 1) * (kPanel / kTileCols + 1);

// Cuts the pairs of rows 0..na-1 with themselves (nb = 0), or with the nb rows behind them, into tiles. Two strips of rows take turns
// at the columns, so that those come half as often from the second cache.
inline int cut(int na, int nb, int L, Tile* tiles) {
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
inline void assign(Tile* tiles, int count, int fetches, int packs) {
  for (int i = 0; i <= count; ++i) {
    tiles[i].fetch = fetches * i / count;
    tiles[i].pack = packs * i / count;
  }
}

// The parts of a row of `length` numbers, and zeros up to a whole round behind its end.
template <class T>
inline void pack_row(const T* row, int64_t length, typename Stored<T>::Vec::Acc* out) {
  using V = typename Stored<T>::Vec;
  constexpr int64_t L = kStep<T>, R = kRound * L;
  const int64_t padded = (length + R - 1) / R * R;
  for (int part = 0; part < V::parts; ++part, out += kSubSteps * V::width) {
    typename V::Acc* to = out;
    int64_t t = part * V::width;
    for (; t + V::width <= length; t += L, to += V::width) V::store(to, V::load(row + t));
    for (; t < padded; t += L)
      for (int lane = 0; lane < V::width; ++lane, ++to) {
        *to = 0;
        if (t + lane < length) read(row + t + lane, to);
      }
  }
}

// The stretch behind the one that is worked off.
template <class T>
struct Next {
  using V = typename Stored<T>::Vec;
  const T* rows[2 * kPanel + Packed<V>::ahead];  // its rows, from where it begins; then the first ones of the stretch behind it
  int count, packs;                              // how many rows, and how many of them are to be packed
  bool whole;                                    // both stretches have all their steps: a tile can copy a row
  int64_t length;
  typename V::Acc* packed;
};

template <class T, class Rows, class V = typename Stored<T>::Vec>
inline void run_tiles(const Tile* tiles, int count, Rows rows, int steps, bool first, const Next<T>& next, typename V::Acc* lanes) {
  const int rounds = (steps + kRound - 1) / kRound;
  constexpr unsigned kPiece = kSubSteps * kStep<T> / Rows::pieces;
  auto piece = [&](unsigned i) { return next.rows[Rows::ahead + i / Rows::pieces] + i % Rows::pieces * kPiece; };
  for (const Tile* t = tiles; t < tiles + count; ++t) {
    Chore<T> chore;
    int fetch = t->fetch, pack = t->pack;
    for (int part = 0; part < V::parts; ++part) chore.fetch[part] = piece(fetch < t[1].fetch ? fetch++ : 0);
    for (; fetch < t[1].fetch; ++fetch)  // more than its loop has room for
      for (unsigned e = 0; e < kPiece; e += kStep<T>) __builtin_prefetch(piece(fetch) + e, 0, 2);
    chore.from = next.rows[pack];
    if (pack < t[1].pack && next.whole) chore.to = next.packed + pack++ * kPackedRow<V>;
    for (; pack < t[1].pack; ++pack) pack_row(next.rows[pack], next.length, next.packed + pack * kPackedRow<V>);
    kTileRuns<T, Rows>.run[t->R - 1][t->C][chore.to != nullptr](rows.from(t->row), rows.from(t->column), rounds, first, chore, lanes + t->lanes);
  }
}

// Adds the lanes of a whole chunk to its pairs: a tile's row i is row pa + i of all, its column j is pb + j.
template <class Acc>
inline void fold_tiles(const Tile* tiles, int count, int k, int pa, int pb, const Acc* lanes, double* out) {
  for (const Tile* t = tiles; t < tiles + count; ++t)
    for (int i = 0; i < t->R; ++i)
      for (int j = t->C ? 0 : i; j < (t->C ? t->C : t->R); ++j, lanes += 64 / sizeof(Acc))
        out[pair_index(k, pa + t->row + i, pb + t->column + j)] += fold(lanes);
}

// One stretch of one pair of panels: the order in which a range of chunks is worked off.
struct Stretch {
  int64_t begin, end, chunk;
  int pa, pb;
};

// Adds the Gramians of chunks [first, last) of k rows of n elements, in order; acc_of(chunk) says where to.
template <class T, class AccOf>
inline void gram_panels(const T* const* rows, int k, int64_t n, int64_t first, int64_t last, const AccOf& acc_of) {
  using V = typename Stored<T>::Vec;
  using Acc = typename V::Acc;
  constexpr int L = kStep<T>, kStretch = kSubSteps * L;
  constexpr bool readable = std::is_same<T, Acc>::value;  // without a conversion
  Arena arena;
  const int most = k < 2 * kPanel ? k : 2 * kPanel;
  Acc* lanes = arena.take<Acc>(k <= kPanel ? pair_count(k) * L : kPanel * kPanel * L);
  Acc* packed[2] = {arena.take<Acc>(most * kPackedRow<V>), arena.take<Acc>(most * kPackedRow<V>)};
  Tile* tiles = arena.take<Tile>(kMaxTiles + 1);

  auto end_of = [&](int64_t chunk) { return (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n; };
  auto stretch = [&](int64_t begin, int64_t chunk, int pa, int pb) {
    return Stretch{begin, end_of(chunk) - begin < kStretch ? end_of(chunk) : begin + kStretch, chunk, pa, pb};
  };
  auto following = [&](const Stretch& s) {
    if (s.end < end_of(s.chunk)) return stretch(s.end, s.chunk, s.pa, s.pb);
    if (s.pb + kPanel < k) return stretch(s.chunk * kChunk, s.chunk, s.pa, s.pb + kPanel);
    if (s.pa + kPanel < k) return stretch(s.chunk * kChunk, s.chunk, s.pa + kPanel, s.pa + kPanel);
    if (s.chunk + 1 < last) return stretch((s.chunk + 1) * kChunk, s.chunk + 1, 0, 0);
    return Stretch{0, 0, last, 0, 0};
  };
  auto rows_of = [&](int panel) { return k - panel < kPanel ? k - panel : kPanel; };
  auto whole = [&](const Stretch& s) { return s.end - s.begin == kStretch; };
  auto in_place = [&](const Stretch& s) { return readable && k <= kInPlace && whole(s); };
  auto describe = [&](const Stretch& s, Acc* to) {
    Next<T> next;
    const int na = rows_of(s.pa), nb = s.pa == s.pb ? 0 : rows_of(s.pb);
    for (int i = 0; i < na; ++i) next.rows[i] = rows[s.pa + i] + s.begin;
    for (int j = 0; j < nb; ++j) next.rows[na + j] = rows[s.pb + j] + s.begin;
    const Stretch behind = following(s);
    for (int i = 0; i < Packed<V>::ahead; ++i) next.rows[na + nb + i] = rows[behind.pa + (behind.pa + i < k ? i : 0)] + behind.begin;
    next.count = s.chunk == last ? 0 : na + nb;
    next.packs = in_place(s) ? 0 : next.count;
    next.length = s.end - s.begin;
    next.packed = to;
    return next;
  };

  Stretch now = stretch(first * kChunk, first, 0, 0);
  const Next<T> start = describe(now, packed[0]);
  for (int i = 0; i < start.packs; ++i) pack_row(start.rows[i], start.length, packed[0] + i * kPackedRow<V>);
  int turn = 0, count = 0, tiled_a = 0, tiled_b = 0, fetches = -1, packs = -1;
  double* acc = nullptr;
  while (now.chunk < last) {
    const Stretch behind = following(now);
    const int na = rows_of(now.pa), nb = now.pa == now.pb ? 0 : rows_of(now.pb), steps = static_cast<int>((now.end - now.begin + L - 1) / L);
    const bool opens = now.begin == now.chunk * kChunk, reads_rows = in_place(now);
    Next<T> next = describe(behind, packed[1 - turn]);
    next.whole = whole(now) && whole(behind);
    const int pieces = next.count * (reads_rows ? InPlace<V>::pieces : Packed<V>::pieces);
    const bool cuts = na != tiled_a || nb != tiled_b;
    if (cuts) count = cut(tiled_a = na, tiled_b = nb, L, tiles);
    if (cuts || pieces != fetches || next.packs != packs) assign(tiles, count, fetches = pieces, packs = next.packs);
    if constexpr (readable)
      if (reads_rows) run_tiles(tiles, count, InPlace<V>{rows, now.begin}, steps, opens, next, lanes);
    if (!reads_rows) run_tiles(tiles, count, Packed<V>{packed[turn]}, steps, opens, next, lanes);
    if (now.end == end_of(now.chunk)) {
      if (now.pa == 0 && now.pb == 0) acc = acc_of(now.chunk);
      fold_tiles(tiles, count, k, now.pa, nb ? now.pb - na : now.pa, lanes, acc);
    }
    now = behind;
    turn = 1 - turn;
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
