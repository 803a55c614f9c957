// The Gramian as a block computes it: in the order of gramian.h and cpu/gram.h, so that GPU and CPU give the same bits.
//
// A thread holds one lane of one chain for every pair of rows. A step of a warp reads 64 bytes at two places: whole sectors, whatever
// the alignment of a row.
#pragma once

#include "../gramian.h"
#include "../numbers.h"
#include "exec.h"

namespace mmfast {
namespace MMFAST_ISA {

// k gradients of batch * inner elements each, rows row_index[i] of K, and where the mask says that they are missing.
template <int max_rows>
struct RowsUpTo {
  const void* ptr[max_rows];
  int16_t row_index[max_rows];
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
inline Units sample_units(int64_t batch, int64_t inner, bool per_sample) { return {batch, per_sample ? 1 : group_size(batch), inner, true}; }

// Row pointers of one tile; null where there is no row, or the mask hides it.
template <class T, int R, class RowSet>
MMFAST_BLOCK inline void tile_row_ptrs(const RowSet& rows, int first, int64_t unit, int64_t offset, const T** ptr) {
  const bool* mask = rows.mask ? rows.mask + unit * rows.mask_stride : nullptr;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = first + i;
    const bool present = row < rows.k && (!mask || mask[rows.row_index[row]]);
    ptr[i] = present ? static_cast<const T*>(rows.ptr[row]) + offset : nullptr;
  }
}

// Where a thread's chain begins in a chunk; its steps are 64 bytes of accumulators apart.
template <class T>
MMFAST_HD inline int64_t chain_start(int thread) {
  constexpr int L = kLanes<T>;
  return thread / L * (kSubSteps * L) + thread % L;
}

// Steps [begin_step, end_step) of the chains of one chunk, a pair each, at elements start + s * L below end: rows x with rows y, or the upper
// triangle of x when C is 0. load(s, e, x, y) reads step s, which is element e.
template <class T, int R, int C, class Load>
MMFAST_BLOCK inline void chain_steps(int begin_step, int end_step, int64_t start, int64_t end, bool whole, Load load, Acc<T>* sums) {
  constexpr int L = kLanes<T>;
  auto step = [&](int s) {
    Acc<T> x[R], y[C ? C : 1];
    load(s, start + s * L, x, y);
    int e = 0;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = C ? 0 : i; j < (C ? C : R); ++j, ++e) sums[e] = fma_rn(x[i], C ? y[C ? j : 0] : x[C ? 0 : j], sums[e]);
  };
  if (whole) {
#pragma unroll C || R > 4 ? 2 : 4
    for (int s = begin_step; s < end_step; ++s) step(s);
  } else {
    for (int s = begin_step; s < end_step && start + s * L < end; ++s) step(s);
  }
}

// Accumulators in shared memory that the chains of a chunk are reduced in.
template <class T>
constexpr int reduce_shared_size() {
  return (kThreads / kLanes<T>) * (kThreads + kLanes<T>);
}

// Reduces the chains of a chunk for P pairs, pairs_per_round at a time, whose chains stand far enough apart to be in different banks.
template <class T, int P>
struct ChainReduce {
  static constexpr int L = kLanes<T>, pairs_per_round = kThreads / L, rounds = (P + pairs_per_round - 1) / pairs_per_round, stride = kThreads + L;
  using ChainSums = typename Block::template PerThread<Acc<T>[P]>;      // of the thread's chain, for every pair
  using PairSums = typename Block::template PerThread<double[rounds]>;  // in round r of pair r * pairs_per_round + t / L, valid where t % L is 0

  // Adds the chains of one chunk to pair_sums: thread t takes lane t % L of pair t / L, its chains in order, lanes in a tree.
  MMFAST_BLOCK static void add(const Block& block, ChainSums& chain_sums, Acc<T>* shared, PairSums& pair_sums) {
    typename Block::template PerThread<Acc<T>> lane_sum;
#pragma unroll
    for (int r = 0; r < rounds; ++r) {
      block.sync();
      block.each_thread([&](int t) {
#pragma unroll
        for (int e = 0; e < pairs_per_round; ++e)
          if (r * pairs_per_round + e < P) shared[e * stride + t] = chain_sums(t)[r * pairs_per_round + e];
      });
      block.sync();
      block.each_thread([&](int t) {
        const Acc<T>* chain = shared + t / L * stride + t % L;
        Acc<T> x = 0;
        if (r * pairs_per_round + t / L < P)
          for (int c = 0; c < kThreads / L; ++c) x += chain[c * L];
        lane_sum(t) = x;
      });
      for (int offset = L / 2; offset > 0; offset /= 2) block.shuffle_down_add(lane_sum, offset, L);
      block.each_thread([&](int t) { pair_sums(t)[r] += static_cast<double>(lane_sum(t)); });
    }
  }
  MMFAST_BLOCK static void clear(const Block& block, PairSums& pair_sums) {
    block.each_thread([&](int t) {
      for (int r = 0; r < rounds; ++r) pair_sums(t)[r] = 0.0;
    });
  }
};

// Writes the sums of the tile (row a.., row b..) of k rows to out[pair_index].
template <class T, int R, int C>
MMFAST_BLOCK inline void store_pairs(const Block& block, int k, int row_a, int row_b, typename ChainReduce<T, C ? R * C : R*(R + 1) / 2>::PairSums& pair_sums, double* out) {
  constexpr int P = C ? R * C : R * (R + 1) / 2;
  using Reduce = ChainReduce<T, P>;
  block.each_thread([&](int t) {
    if (t % Reduce::L) return;
#pragma unroll
    for (int r = 0; r < Reduce::rounds; ++r) {
      const int e = r * Reduce::pairs_per_round + t / Reduce::L;
      if (e >= P) continue;
      int i = 0, j = e;
      if (C) {
        i = e / (C ? C : 1), j = e % (C ? C : 1);
      } else {
        for (int width = R; j >= width; --width) j -= width, ++i;
        j += i;
      }
      i += row_a, j += C ? row_b : row_a;
      if (i < k && j < k) out[pair_index(k, i, j)] = pair_sums(t)[r];
    }
  });
}

// The numbers of one tile of rows; start(unit, offset) for each unit, then load(e, x, y) for its elements.
template <class T, int R, int C>
struct TileRows {
  const Rows& rows;
  int row_a, row_b;
  const T *a[R], *b[C ? C : 1];
  MMFAST_BLOCK void start(int64_t unit, int64_t offset) {
    tile_row_ptrs<T, R>(rows, row_a, unit, offset, a);
    tile_row_ptrs<T, C>(rows, row_b, unit, offset, b);
  }
  MMFAST_BLOCK void load(int64_t e, Acc<T>* x, Acc<T>* y) const {
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = a[i] ? load_acc(a[i] + e) : Acc<T>(0);
#pragma unroll
    for (int j = 0; j < C; ++j) y[j] = b[j] ? load_acc(b[j] + e) : Acc<T>(0);
  }
};

// Pair sums of slot `slot` of R rows with C others (themselves when C is 0), whose numbers `source` has as T. `shared` holds
// reduce_shared_size<T>() accumulators.
template <class T, int R, int C, class Source>
MMFAST_BLOCK inline void sum_slot(const Block& block, Source& source, const Units& units, int64_t slot, Acc<T>* shared,
                                  typename ChainReduce<T, C ? R * C : R*(R + 1) / 2>::PairSums& slot_sums) {
  constexpr int P = C ? R * C : R * (R + 1) / 2;
  using Reduce = ChainReduce<T, P>;
  typename Reduce::PairSums unit_sums, group_sums;
  typename Reduce::ChainSums chain_sums;
  Reduce::clear(block, slot_sums);
  const int64_t last = (slot + 1) * units.group < units.count ? (slot + 1) * units.group : units.count;
  for (int64_t unit = slot * units.group; unit < last; ++unit) {
    source.start(units.samples ? unit : 0, units.samples ? unit * units.elements : 0);
    const int64_t first_chunk = units.samples ? 0 : unit, end_chunk = units.samples ? (units.elements + kChunk - 1) / kChunk : unit + 1;
    const int64_t group = units.samples ? group_size(end_chunk) : 1;
    Reduce::clear(block, unit_sums);
    Reduce::clear(block, group_sums);
    for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int64_t begin = chunk * kChunk, end = begin + kChunk < units.elements ? begin + kChunk : units.elements;
      block.each_thread([&](int t) {
#pragma unroll
        for (int e = 0; e < P; ++e) chain_sums(t)[e] = 0;
        auto load = [&](int, int64_t e, Acc<T>* x, Acc<T>* y) { source.load(e, x, y); };
        chain_steps<T, R, C>(0, kSubSteps, begin + chain_start<T>(t), end, end - begin == kChunk, load, chain_sums(t));
      });
      Reduce::add(block, chain_sums, shared, group_sums);
      if ((chunk + 1) % group == 0 || chunk + 1 == end_chunk)
        block.each_thread([&](int t) {
          for (int r = 0; r < Reduce::rounds; ++r) unit_sums(t)[r] += group_sums(t)[r], group_sums(t)[r] = 0.0;
        });
    }
    block.each_thread([&](int t) {
      for (int r = 0; r < Reduce::rounds; ++r) slot_sums(t)[r] += unit_sums(t)[r];
    });
  }
}

// Slot `slot` of the tile (row a.., row b..): pair sums, written to out[pair_index].
template <class T, int R, int C>
MMFAST_BLOCK inline void gram_slot(const Block& block, const Rows& rows, const Units& units, int64_t slot, int row_a, int row_b, Acc<T>* shared, double* out) {
  typename ChainReduce<T, C ? R * C : R*(R + 1) / 2>::PairSums slot_sums;
  TileRows<T, R, C> tile{rows, row_a, row_b, {}, {}};
  sum_slot<T, R, C>(block, tile, units, slot, shared, slot_sums);
  store_pairs<T, R, C>(block, rows.k, row_a, row_b, slot_sums, out);
}

// G of rows i and j of one problem, -1 where there is no row: its slots in order. A row that the whole problem hides has no products, not even
// the NaN of zero and infinity; one hidden in some samples only, beside an infinite row, has.
MMFAST_BLOCK inline double fold_slots(const double* slots, int64_t count, int64_t pairs, int k, int i, int j, bool hidden) {
  if (i < 0 || j < 0 || hidden) return 0.0;
  const double* partials = slots + pair_index(k, i < j ? i : j, i < j ? j : i);
  double sum = 0.0;
  for (int64_t s = 0; s < count; ++s) sum += partials[s * pairs];
  return sum;
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
