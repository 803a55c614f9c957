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

// From one packed row to the next. A part takes kSubSteps registers and one of padding, so that rows of odd and even number begin in
// different halves of a cache line: two loads of the same half would wait for each other.
template <class V>
constexpr int kPackedRow = (kSubSteps + 1) * V::width;

// Where the rows of a stretch stand: packed, or few enough to be read where they are (the part's first register at `offset`).
template <class V>
struct Packed {
  static constexpr int step = V::width;
  const typename V::Acc* first;
  MMFAST_INLINE const typename V::Acc* operator()(int i) const { return first + i * kPackedRow<V>; }
};
template <class V>
struct InPlace {
  static constexpr int step = V::width * V::parts;
  const typename V::Acc* const* rows;
  int64_t offset;
  MMFAST_INLINE const typename V::Acc* operator()(int i) const { return rows[i] + offset; }
};
constexpr int kInPlace = 10;

// What a tile does besides, a line in each of its steps while the multipliers are busy: fetches a row of the next stretch, or copies one
// that was fetched before. Registers that take a whole step at once leave few tiles to a stretch: there a copy fetches the next row, too.
enum class Task { none, fetch, copy };
template <class T>
struct Chore {
  Task task = Task::none;
  const char* fetch = nullptr;
  const T* from = nullptr;
  typename Stored<T>::Vec::Acc* to = nullptr;
};

// The first chain of a chunk starts the lane sums, the others add to them.
template <class V>
MMFAST_INLINE void meet(typename V::Acc* lanes, typename V::Reg chain, bool first) {
  V::store(lanes, first ? chain : V::add(V::load(lanes), chain));
}

// The pairs of R rows with C others, or with themselves when C is 0; lanes of the pairs stand one after the other.
// A function of its own, for its loop needs every register.
template <class T, int R, int C, Task task, class Rows, class V = typename Stored<T>::Vec>
__attribute__((noinline)) void tile(const Rows& rows, int i0, int j0, int steps, bool first, Chore<T> chore, typename V::Acc* lanes) {
  constexpr int L = kStep<T>, P = C ? R * C : R * (R + 1) / 2;
  const typename V::Acc *a[R], *b[C ? C : 1];
  for (int i = 0; i < R; ++i) a[i] = rows(i0 + i);
  for (int j = 0; j < C; ++j) b[j] = rows(j0 + j);
  typename V::Reg acc[P];
#pragma GCC unroll 32
  for (int e = 0; e < P; ++e) acc[e] = V::zero();
  for (int64_t t = 0; t < static_cast<int64_t>(steps) * Rows::step; t += Rows::step) {
    if constexpr (task == Task::fetch || (task == Task::copy && V::parts == 1)) {
      __builtin_prefetch(chore.fetch, 0, 2);
      chore.fetch += L * sizeof(T);
    }
    if constexpr (task == Task::copy) {
      V::store(chore.to, V::load(chore.from));
      chore.from += L;
      chore.to += V::width;
    }
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
#pragma GCC unroll 32
  for (int e = 0; e < P; ++e) meet<V>(lanes + e * L, acc[e], first);
}

// Elements [begin, end) of a row from its register `part` on, one of each step, zeros behind the end.
template <class T>
inline void pack_part(const T* row, int64_t begin, int64_t end, int part, typename Stored<T>::Vec::Acc* out) {
  using V = typename Stored<T>::Vec;
  constexpr int L = kStep<T>;
  row += begin + part * V::width;
  const int64_t whole = (end - begin) / L * L, rest = end - begin - whole - part * V::width;
  for (int64_t t = 0; t < whole; t += L, out += V::width) V::store(out, V::load(row + t));
  for (int lane = 0; begin + whole < end && lane < V::width; ++lane) {
    out[lane] = 0;
    if (lane < rest) read(row + whole + lane, out + lane);
  }
}

// Packs the rows of the next stretch, as chores of `tiles` tiles where it can.
template <class T>
struct Feed {
  using V = typename Stored<T>::Vec;
  static constexpr int kFetches = V::parts > 1;           // jobs of a row: one that fetches the row behind it,
  static constexpr int kJobs = kFetches + V::parts;       // and one that copies each part
  const T* rows[2 * kPanel];
  int count = 0, tiles = 0, next = 0, credit = 0;
  int64_t begin, end, apart;
  typename V::Acc* packed;
  bool in_place = false;  // nothing to copy: a row is only fetched

  int jobs() const { return count * (in_place ? 1 : kJobs); }
  typename V::Acc* place(int row, int part) { return packed + part * apart + row * kPackedRow<V>; }
  void pack() {
    const int row = next / kJobs, part = next % kJobs - kFetches;
    if (part >= 0) pack_part(rows[row], begin, end, part, place(row, part));
    ++next;
  }
  void pack_all() {
    while (next < jobs()) pack();
  }
  // The share of one tile of `steps` steps; what it cannot do is done at once.
  Chore<T> chore(int steps) {
    Chore<T> c;
    auto fetch = [&](int row) {
      if (row >= count) row = count - 1;  // nothing is left to fetch: any row that is there will do
      c.fetch = reinterpret_cast<const char*>(rows[row] + begin);
      c.task = Task::fetch;
    };
    if (in_place) {
      if (next < count) fetch(next++);
      return c;
    }
    credit += jobs();
    if (credit >= tiles && end - begin == static_cast<int64_t>(steps) * kStep<T>) {
      const int row = next / kJobs, part = next % kJobs - kFetches;
      fetch(row + 1);
      if (part >= 0) {
        c.task = Task::copy;
        c.from = rows[row] + begin + part * V::width;
        c.to = place(row, part);
      }
      ++next;
      credit -= tiles;
    }
    for (; credit >= tiles; credit -= tiles) pack();
    return c;
  }
};

// How many tiles strips() makes.
inline int tiles_of(int na, int nb) {
  int count = 0;
  for (int i = 0; i < na; i += kTileRows) {
    const int columns = nb ? nb : na - i - kTileRows;
    count += (nb == 0) + (columns > 0 ? (columns + kTileCols - 1) / kTileCols : 0);
  }
  return count;
}

template <class T, int R, int C, class Rows, class V = typename Stored<T>::Vec>
inline void next_tile(const Rows& rows, int i, int j, int steps, bool first, Feed<T>& feed, typename V::Acc*& lanes) {
  const Chore<T> chore = feed.chore(steps);
  switch (chore.task) {
    case Task::none: tile<T, R, C, Task::none>(rows, i, j, steps, first, chore, lanes); break;
    case Task::fetch: tile<T, R, C, Task::fetch>(rows, i, j, steps, first, chore, lanes); break;
    case Task::copy: tile<T, R, C, Task::copy>(rows, i, j, steps, first, chore, lanes); break;
  }
  lanes += (C ? R * C : R * (R + 1) / 2) * kStep<T>;
}

// R rows from row i on with columns j..end-1; with themselves first when j is i.
template <class T, int R, class Rows, class V = typename Stored<T>::Vec>
inline void strip(const Rows& rows, int i, int j, int end, int steps, bool first, Feed<T>& feed, typename V::Acc*& lanes) {
  if (j == i) {
    next_tile<T, R, 0>(rows, i, i, steps, first, feed, lanes);
    j += R;
  }
  for (; j + kTileCols <= end; j += kTileCols) next_tile<T, R, kTileCols>(rows, i, j, steps, first, feed, lanes);
  switch (end - j) {
    case 1: return next_tile<T, R, 1>(rows, i, j, steps, first, feed, lanes);
    case 2: return next_tile<T, R, 2>(rows, i, j, steps, first, feed, lanes);
    case 3: return next_tile<T, R, 3>(rows, i, j, steps, first, feed, lanes);
  }
}

// One part of a stretch: rows 0..na-1 with themselves (nb = 0), or with the nb rows behind them.
template <class T, class Rows, class V = typename Stored<T>::Vec>
inline void strips(const Rows& rows, int na, int nb, int steps, bool first, Feed<T>& feed, typename V::Acc* lanes) {
  for (int i = 0; i < na; i += kTileRows) {
    const int j = nb ? na : i, end = na + nb;
    switch (na - i) {
      case 1: strip<T, 1>(rows, i, j, end, steps, first, feed, lanes); break;
      case 2: strip<T, 2>(rows, i, j, end, steps, first, feed, lanes); break;
#if defined(__AVX512F__)
      case 3: strip<T, 3>(rows, i, j, end, steps, first, feed, lanes); break;
      case 4: strip<T, 4>(rows, i, j, end, steps, first, feed, lanes); break;
      case 5: strip<T, 5>(rows, i, j, end, steps, first, feed, lanes); break;
#endif
      default: strip<T, kTileRows>(rows, i, j, end, steps, first, feed, lanes);
    }
  }
}

// Adds the lanes of a whole chunk to its pairs, in the order in which strips() wrote them; the columns are rows pb.. of all.
template <class Acc>
inline void fold_strips(int k, int pa, int na, int pb, int nb, const Acc* lanes, double* out) {
  auto add = [&](int i, int j) {
    out[pair_index(k, pa + i, pb + j)] += fold(lanes);
    lanes += 64 / sizeof(Acc);
  };
  for (int top = 0; top < na; top += kTileRows) {
    const int bottom = na - top < kTileRows ? na : top + kTileRows, columns = nb ? nb : na;
    for (int i = top; nb == 0 && i < bottom; ++i)
      for (int j = i; j < bottom; ++j) add(i, j);
    for (int left = nb ? 0 : bottom; left < columns; left += kTileCols)
      for (int i = top; i < bottom; ++i)
        for (int j = left; j < columns && j < left + kTileCols; ++j) add(i, j);
  }
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
  Arena arena;
  const int most = k < 2 * kPanel ? k : 2 * kPanel;
  Acc* lanes = arena.take<Acc>(k <= kPanel ? pair_count(k) * L : kPanel * kPanel * L);
  const int64_t apart = static_cast<int64_t>(most) * kPackedRow<V>;
  Acc* packed[2] = {arena.take<Acc>(V::parts * apart), arena.take<Acc>(V::parts * apart)};

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
  auto in_place = [&](const Stretch& s) { return std::is_same<T, Acc>::value && k <= kInPlace && s.end - s.begin == kStretch; };
  int turn = 0;
  auto feed_of = [&](const Stretch& s) {
    Feed<T> feed;
    const int na = rows_of(s.pa), nb = s.pa == s.pb ? 0 : rows_of(s.pb);
    if (s.chunk < last) feed.count = na + nb;
    for (int i = 0; i < na; ++i) feed.rows[i] = rows[s.pa + i];
    for (int j = 0; j < nb; ++j) feed.rows[na + j] = rows[s.pb + j];
    feed.begin = s.begin, feed.end = s.end, feed.apart = apart, feed.packed = packed[turn], feed.in_place = in_place(s);
    return feed;
  };

  Stretch now = stretch(first * kChunk, first, 0, 0);
  if (!in_place(now)) feed_of(now).pack_all();
  double* acc = nullptr;
  while (now.chunk < last) {
    const Stretch next = following(now);
    const int na = rows_of(now.pa), nb = now.pa == now.pb ? 0 : rows_of(now.pb), steps = static_cast<int>((now.end - now.begin + L - 1) / L);
    const bool opens = now.begin == now.chunk * kChunk;
    const Acc* at = packed[turn];
    turn ^= 1;
    Feed<T> feed = feed_of(next);
    feed.tiles = V::parts * tiles_of(na, nb);
    for (int part = 0; part < V::parts; ++part) {
      Acc* lane = lanes + part * V::width;
      if constexpr (std::is_same<T, Acc>::value)
        if (in_place(now)) {
          strips(InPlace<V>{rows, now.begin + part * V::width}, na, nb, steps, opens, feed, lane);
          continue;
        }
      strips(Packed<V>{at + part * apart}, na, nb, steps, opens, feed, lane);
    }
    if (now.end == end_of(now.chunk)) {
      if (now.pa == 0 && now.pb == 0) acc = acc_of(now.chunk);
      fold_strips(k, now.pa, na, now.pb, nb, lanes, acc);
    }
    now = next;
  }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
