// The Gramian as a block computes it: in the order of gramian.h and cpu/gram.h, so that GPU and CPU give the same bits.
//
// A thread holds one lane of one chain for every pair of rows. A step of a warp reads 64 bytes at two places: whole sectors, whatever
// the alignment of a row.
#pragma once

#include "../gramian.h"
#include "exec.h"
#include "numbers.h"

namespace mmfast {
namespace MMFAST_ISA {

// k gradients of batch * inner elements each, at `places` among K rows, and where the mask says that they are missing.
template <int most>
struct RowsUpTo {
  const void* at[most];
  int16_t places[most];
  int k;
  const bool* mask;     // [K] of each unit, or null
  int64_t mask_stride;  // from one unit to the next
};
using Rows = RowsUpTo<kMaxRows>;

// What is summed into one slot: `group` units in order. A unit is a chunk of the whole gradient, or a sample.
struct Units {
  int64_t count;
  int64_t group;
  int64_t elements;  // of a unit that is a sample; of the whole gradient otherwise
  bool samples;
  MMFAST_HD int64_t slots() const { return (count + group - 1) / group; }
};

inline Units whole_units(int64_t n) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  return {chunks, group_size(chunks), n, false};
}
inline Units sample_units(int64_t batch, int64_t inner, bool apart) { return {batch, apart ? 1 : group_size(batch), inner, true}; }

// Row pointers of one tile; null where there is no row, or the mask hides it.
template <class T, int R, class RowSet>
MMFAST_BLOCK inline void tile_rows(const RowSet& rows, int first, int64_t unit, int64_t offset, const T** at) {
  const bool* mask = rows.mask ? rows.mask + unit * rows.mask_stride : nullptr;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = first + i;
    const bool there = row < rows.k && (!mask || mask[rows.places[row]]);
    at[i] = there ? static_cast<const T*>(rows.at[row]) + offset : nullptr;
  }
}

// Where a thread's chain begins in a chunk; its steps are 64 bytes of accumulators apart.
template <class T>
MMFAST_HD inline int64_t chain_start(int thread) {
  constexpr int L = 64 / sizeof(Acc<T>);
  return thread / L * (kSubSteps * L) + thread % L;
}

// Steps [from, to) of the chains of one chunk, a pair each, at elements at + s * L below end: rows x with rows y, or the upper triangle of x
// when C is 0. load(s, t, x, y) reads step s, which is element t.
template <class T, int R, int C, class Load>
MMFAST_BLOCK inline void chain_steps(int from, int to, int64_t at, int64_t end, bool whole, Load load, Acc<T>* sums) {
  constexpr int L = 64 / sizeof(Acc<T>);
  auto step = [&](int s) {
    Acc<T> x[R], y[C ? C : 1];
    load(s, at + s * L, x, y);
    int e = 0;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = C ? 0 : i; j < (C ? C : R); ++j, ++e) sums[e] = fused(x[i], C ? y[C ? j : 0] : x[C ? 0 : j], sums[e]);
  };
  if (whole) {
#pragma unroll C || R > 4 ? 2 : 4
    for (int s = from; s < to; ++s) step(s);
  } else {
    for (int s = from; s < to && at + s * L < end; ++s) step(s);
  }
}

// Slot `slot` of the tile (row a.., row b..): pair sums, written to out[pair_index]. `shared` holds tile_shared<T>() numbers.
template <class T>
constexpr int tile_shared() {
  return (kThreads * static_cast<int>(sizeof(Acc<T>)) / 64) * (kThreads + 64 / static_cast<int>(sizeof(Acc<T>)));
}

// How the chains of P pairs meet: so many pairs at a time, whose chains stand far enough apart to be in different banks.
template <class T, int P>
struct Meeting {
  static constexpr int L = 64 / sizeof(Acc<T>), at_once = kThreads / L, rounds = (P + at_once - 1) / at_once, stride = kThreads + L;
  using PerPair = typename Block::template Per<Acc<T>[P]>;
  using PerRound = typename Block::template Per<double[rounds]>;

  // Adds the chains of one chunk to `total`: thread t meets lane t % L of pair t / L, its chains in order, lanes in a tree.
  MMFAST_BLOCK static void add(const Block& block, PerPair& sums, Acc<T>* shared, PerRound& total) {
    typename Block::template Per<Acc<T>> lane;
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      block.sync();
      block.each([&](int t) {
#pragma unroll
        for (int e = 0; e < at_once; ++e)
          if (r * at_once + e < P) shared[e * stride + t] = sums(t)[r * at_once + e];
      });
      block.sync();
      block.each([&](int t) {
        const Acc<T>* chain = shared + t / L * stride + t % L;
        Acc<T> x = 0;
        if (r * at_once + t / L < P)
          for (int c = 0; c < kThreads / L; ++c) x += chain[c * L];
        lane(t) = x;
      });
      for (int apart = L / 2; apart > 0; apart /= 2) block.add_from(lane, apart, L);
      block.each([&](int t) { total(t)[r] += static_cast<double>(lane(t)); });
    }
  }
  MMFAST_BLOCK static void clear(const Block& block, PerRound& total) {
    block.each([&](int t) {
      for (int r = 0; r < rounds; ++r) total(t)[r] = 0.0;
    });
  }
};

// Writes the sums of the tile (row a.., row b..) of k rows to out[pair_index].
template <class T, int R, int C>
MMFAST_BLOCK inline void put_pairs(const Block& block, int k, int row_a, int row_b, typename Meeting<T, C ? R * C : R*(R + 1) / 2>::PerRound& total, double* out) {
  constexpr int P = C ? R * C : R * (R + 1) / 2;
  using Meet = Meeting<T, P>;
  block.each([&](int t) {
    if (t % Meet::L) return;
#pragma unroll
    for (int r = 0; r < Meet::rounds; ++r) {
      const int e = r * Meet::at_once + t / Meet::L;
      if (e >= P) continue;
      int i = 0, j = e;
      if (C) {
        i = e / (C ? C : 1), j = e % (C ? C : 1);
      } else {
        for (int width = R; j >= width; --width) j -= width, ++i;
        j += i;
      }
      i += row_a, j += C ? row_b : row_a;
      if (i < k && j < k) out[pair_index(k, i, j)] = total(t)[r];
    }
  });
}

template <class T, int R, int C>
MMFAST_BLOCK inline void gram_slot(const Block& block, const Rows& rows, const Units& units, int64_t slot, int row_a, int row_b, Acc<T>* shared, double* out) {
  constexpr int P = C ? R * C : R * (R + 1) / 2;
  using Meet = Meeting<T, P>;
  typename Meet::PerRound total, own, some;
  typename Meet::PerPair sums;
  Meet::clear(block, total);
  const int64_t last = (slot + 1) * units.group < units.count ? (slot + 1) * units.group : units.count;
  for (int64_t unit = slot * units.group; unit < last; ++unit) {
    const T *a[R], *b[C ? C : 1];
    const int64_t offset = units.samples ? unit * units.elements : 0, row_mask = units.samples ? unit : 0;
    tile_rows<T, R>(rows, row_a, row_mask, offset, a);
    tile_rows<T, C>(rows, row_b, row_mask, offset, b);
    const int64_t first_chunk = units.samples ? 0 : unit, end_chunk = units.samples ? (units.elements + kChunk - 1) / kChunk : unit + 1;
    const int64_t group = units.samples ? group_size(end_chunk) : 1;
    Meet::clear(block, own);
    Meet::clear(block, some);
    for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int64_t begin = chunk * kChunk, end = begin + kChunk < units.elements ? begin + kChunk : units.elements;
      block.each([&](int t) {
#pragma unroll
        for (int e = 0; e < P; ++e) sums(t)[e] = 0;
        auto load = [&](int, int64_t at, Acc<T>* x, Acc<T>* y) {
#pragma unroll
          for (int i = 0; i < R; ++i) x[i] = a[i] ? number(a[i] + at) : Acc<T>(0);
#pragma unroll
          for (int j = 0; j < C; ++j) y[j] = b[j] ? number(b[j] + at) : Acc<T>(0);
        };
        chain_steps<T, R, C>(0, kSubSteps, begin + chain_start<T>(t), end, end - begin == kChunk, load, sums(t));
      });
      Meet::add(block, sums, shared, some);
      if ((chunk + 1) % group == 0 || chunk + 1 == end_chunk)
        block.each([&](int t) {
          for (int r = 0; r < Meet::rounds; ++r) own(t)[r] += some(t)[r], some(t)[r] = 0.0;
        });
    }
    block.each([&](int t) {
      for (int r = 0; r < Meet::rounds; ++r) total(t)[r] += own(t)[r];
    });
  }
  put_pairs<T, R, C>(block, rows.k, row_a, row_b, total, out);
}

// G of rows i and j of one problem, -1 where there is no row: its slots in order. A row that the whole problem hides has no products, not even
// the NaN of zero and infinity; one hidden in some samples only, beside an infinite row, has.
MMFAST_BLOCK inline double fold_slots(const double* slots, int64_t count, int64_t pairs, int k, int i, int j, bool hidden) {
  if (i < 0 || j < 0 || hidden) return 0.0;
  const double* at = slots + pair_index(k, i < j ? i : j, i < j ? j : i);
  double total = 0.0;
  for (int64_t s = 0; s < count; ++s) total += at[s * pairs];
  return total;
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
