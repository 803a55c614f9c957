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
struct Rows {
  const void* at[kMaxRows];
  int16_t places[kMaxRows];
  int k;
  const bool* mask;     // [K] of each unit, or null
  int64_t mask_stride;  // from one unit to the next
};

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
template <class T, int R>
MMFAST_BLOCK inline void tile_rows(const Rows& rows, int first, int64_t unit, int64_t offset, const T** at) {
  const bool* mask = rows.mask ? rows.mask + unit * rows.mask_stride : nullptr;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int row = first + i;
    const bool there = row < rows.k && (!mask || mask[rows.places[row]]);
    at[i] = there ? static_cast<const T*>(rows.at[row]) + offset : nullptr;
  }
}

// The chains of one chunk, a pair each: rows a with rows b, or the upper triangle of a when C is 0.
template <class T, int R, int C>
MMFAST_BLOCK inline void chains(int thread, const T* const* a, const T* const* b, int64_t begin, int64_t end, Acc<T>* sums) {
  constexpr int L = 64 / sizeof(Acc<T>), P = C ? R * C : R * (R + 1) / 2;
#pragma unroll
  for (int e = 0; e < P; ++e) sums[e] = 0;
  const int64_t first = begin + thread / L * (kSubSteps * L) + thread % L;
  auto step = [&](int64_t t) {
    Acc<T> x[R], y[C ? C : 1];
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = a[i] ? number(a[i] + t) : Acc<T>(0);
#pragma unroll
    for (int j = 0; j < C; ++j) y[j] = b[j] ? number(b[j] + t) : Acc<T>(0);
    int e = 0;
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = C ? 0 : i; j < (C ? C : R); ++j, ++e) sums[e] = fused(x[i], C ? y[C ? j : 0] : x[C ? 0 : j], sums[e]);
  };
  if (end - begin == kChunk) {
#pragma unroll C ? 2 : 4
    for (int s = 0; s < kSubSteps; ++s) step(first + s * L);
  } else {
    for (int s = 0; s < kSubSteps && first + s * L < end; ++s) step(first + s * L);
  }
}

// Slot `slot` of the tile (row a.., row b..): pair sums, written to out[pair_index]. `shared` holds tile_shared<T>() numbers.
template <class T>
constexpr int tile_shared() {
  return (kThreads * static_cast<int>(sizeof(Acc<T>)) / 64) * (kThreads + 64 / static_cast<int>(sizeof(Acc<T>)));
}

template <class T, int R, int C>
MMFAST_BLOCK inline void gram_slot(const Block& block, const Rows& rows, const Units& units, int64_t slot, int row_a, int row_b, Acc<T>* shared, double* out) {
  constexpr int L = 64 / sizeof(Acc<T>), P = C ? R * C : R * (R + 1) / 2;
  constexpr int kAtOnce = kThreads / L, kRounds = (P + kAtOnce - 1) / kAtOnce;  // pairs whose chains meet together
  constexpr int kStride = kThreads + L;                                         // keeps two pairs out of each other's banks
  typename Block::template Per<double[kRounds]> total, own, some;
  typename Block::template Per<Acc<T>[P]> sums;
  typename Block::template Per<Acc<T>> lane;
  block.each([&](int t) {
    for (int r = 0; r < kRounds; ++r) total(t)[r] = 0.0;
  });
  const int64_t last = (slot + 1) * units.group < units.count ? (slot + 1) * units.group : units.count;
  for (int64_t unit = slot * units.group; unit < last; ++unit) {
    const T *a[R], *b[C ? C : 1];
    const int64_t offset = units.samples ? unit * units.elements : 0, row_mask = units.samples ? unit : 0;
    tile_rows<T, R>(rows, row_a, row_mask, offset, a);
    tile_rows<T, C>(rows, row_b, row_mask, offset, b);
    const int64_t first_chunk = units.samples ? 0 : unit, end_chunk = units.samples ? (units.elements + kChunk - 1) / kChunk : unit + 1;
    const int64_t group = units.samples ? group_size(end_chunk) : 1;
    block.each([&](int t) {
      for (int r = 0; r < kRounds; ++r) own(t)[r] = some(t)[r] = 0.0;
    });
    for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int64_t begin = chunk * kChunk, end = begin + kChunk < units.elements ? begin + kChunk : units.elements;
      block.each([&](int t) { chains<T, R, C>(t, a, b, begin, end, sums(t)); });
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        block.sync();
        block.each([&](int t) {
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e)
            if (r * kAtOnce + e < P) shared[e * kStride + t] = sums(t)[r * kAtOnce + e];
        });
        block.sync();
        block.each([&](int t) {  // thread t meets lane t % L of pair t / L: its chains in order
          const Acc<T>* chain = shared + t / L * kStride + t % L;
          Acc<T> x = 0;
          if (r * kAtOnce + t / L < P)
            for (int c = 0; c < kThreads / L; ++c) x += chain[c * L];
          lane(t) = x;
        });
        for (int stride = L / 2; stride > 0; stride /= 2) block.add_from(lane, stride, L);
        block.each([&](int t) { some(t)[r] += static_cast<double>(lane(t)); });
      }
      if ((chunk + 1) % group == 0 || chunk + 1 == end_chunk)
        block.each([&](int t) {
          for (int r = 0; r < kRounds; ++r) own(t)[r] += some(t)[r], some(t)[r] = 0.0;
        });
    }
    block.each([&](int t) {
      for (int r = 0; r < kRounds; ++r) total(t)[r] += own(t)[r];
    });
  }
  block.each([&](int t) {
    if (t % L) return;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int e = r * kAtOnce + t / L;
      if (e >= P) continue;
      int i = 0, j = e;
      if (C) {
        i = e / (C ? C : 1), j = e % (C ? C : 1);
      } else {
        for (int width = R; j >= width; --width) j -= width, ++i;
        j += i;
      }
      i += row_a, j += C ? row_b : row_a;
      if (i < rows.k && j < rows.k) out[pair_index(rows.k, i, j)] = total(t)[r];
    }
  });
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
