// One launch that reads the gradients once: each block keeps what it reads in shared memory, adds it up, and after the Gramian is known combines
// what it kept. What does not fit is read again, the newest first. The order of all sums is that of gram.h and combine.h.
#pragma once

#include "combine.h"
#include "plan.h"

namespace mmfast {
namespace MMFAST_ISA {

static_assert(kThreads == kPersistentThreads && kThreads * kSubSteps == kChunk, "a step of a chunk is one number of every row and thread");

using FewRows = RowsUpTo<kPersistentRows>;

// What a block keeps: the first `steps` steps of its chunks, [steps, k, kThreads]. A thread reads and writes its own numbers only.
template <class T>
struct Kept {
  static constexpr int kGroups = 4;  // in which they arrive
  T* numbers;
  int64_t steps;
  int k;
  MMFAST_BLOCK T* at(int64_t step, int row, int thread) const { return numbers + (step * k + row) * kThreads + thread; }
  MMFAST_BLOCK int64_t group_end(int group) const { return steps * (group + 1) / kGroups; }
};

// The chunks of one block: those of slots `block`, block + blocks, ...
struct Share {
  int64_t block, blocks;
  // f(slot, chunk, ordinal among the block's chunks), in order
  template <class F>
  MMFAST_BLOCK void each_chunk(const Units& units, F f) const {
    int64_t ordinal = 0;
    for (int64_t slot = block; slot < units.slots(); slot += blocks)
      for (int64_t chunk = slot * units.group; chunk < (slot + 1) * units.group && chunk < units.count; ++chunk) f(slot, chunk, ordinal++);
  }
  // f(chunk, ordinal), the last first
  template <class F>
  MMFAST_BLOCK void each_chunk_back(const Units& units, F f) const {
    const int64_t slots = units.slots(), own = (slots - block + blocks - 1) / blocks;
    for (int64_t i = own - 1; i >= 0; --i)
      for (int64_t c = units.group - 1; c >= 0; --c) {
        const int64_t chunk = (block + i * blocks) * units.group + c;
        if (chunk < units.count) f(chunk, i * units.group + c);
      }
  }
};

// Where the pair sums of the slots stand: one after the other in memory, or, in a cluster, each with the block that sums it.
struct Slots {
  double* at;
  unsigned blocks;  // of the cluster, that share them out as Share says; 0 in memory
  // fewer than 2^32 of them, and so short divisions
  MMFAST_BLOCK double* own(int64_t slot, int64_t pairs) const { return at + (blocks ? static_cast<unsigned>(slot) / blocks : slot) * pairs; }
  MMFAST_BLOCK double read(unsigned slot, unsigned pairs, unsigned pair) const {
    return blocks ? of_peer(at, slot % blocks)[slot / blocks * pairs + pair] : from_others(at + static_cast<int64_t>(slot) * pairs + pair);
  }
};

// Steps of the chunk that are kept, and the elements at which chunk and gradient end.
template <class T>
MMFAST_BLOCK inline int kept_of(const Kept<T>& kept, int64_t ordinal) {
  const int64_t left = kept.steps - ordinal * kSubSteps;
  return static_cast<int>(left < 0 ? 0 : left < kSubSteps ? left : kSubSteps);
}
MMFAST_HD inline int64_t chunk_end(const Units& units, int64_t chunk) { return (chunk + 1) * kChunk < units.elements ? (chunk + 1) * kChunk : units.elements; }

// Asks for all that is kept, in groups. Where a row is masked or ends, nothing is asked for, and nothing is read later.
template <class T, int R>
MMFAST_BLOCK inline void ask(const Block& block, const FewRows& rows, const Units& units, const Share& share, const Kept<T>& kept) {
  constexpr int L = 64 / sizeof(Acc<T>), U = kStepsAtOnce;
  const T* a[R];
  tile_rows<T, R>(rows, 0, 0, 0, a);
  int group = 0;
  share.each_chunk(units, [&](int64_t, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk), first = ordinal * kSubSteps;
    for (int s = 0; s < kept_of(kept, ordinal); s += U) {
      block.each([&](int t) {
        const int64_t e = chunk * kChunk + chain_start<T>(t) + s * L;
        T* to = kept.at(first + s, 0, t);
        if constexpr (sizeof(T) >= 4) {
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u)
              if (a[i] && e + u * L < end) copy_ahead(to + (u * kept.k + i) * kThreads, a[i] + e + u * L);
        } else {  // through registers, and so all reads before the first write
          T x[R * U];
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u) x[i * U + u] = a[i] && e + u * L < end ? a[i][e + u * L] : T{};
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u)
              if (a[i]) to[(u * kept.k + i) * kThreads] = x[i * U + u];
        }
      });
      for (; group < Kept<T>::kGroups && first + s + U >= kept.group_end(group); ++group) end_group();
    }
  });
  for (; group < Kept<T>::kGroups; ++group) end_group();
}

// Lets what is kept up to a step through, and returns how far that reaches.
template <class T>
MMFAST_BLOCK inline int64_t await(const Kept<T>& kept, int64_t step) {
  if (step < kept.group_end(0)) return wait_but_for<3>(), kept.group_end(0);
  if (step < kept.group_end(1)) return wait_but_for<2>(), kept.group_end(1);
  if (step < kept.group_end(2)) return wait_but_for<1>(), kept.group_end(2);
  return wait_but_for<0>(), kept.steps;
}

// Pair sums of the block's slots, written to where those stand, at pair_index.
template <class T, int R>
MMFAST_BLOCK inline void sum_kept(const Block& block, const FewRows& rows, const Units& units, const Share& share, const Kept<T>& kept, Acc<T>* shared, const Slots& slots) {
  constexpr int P = R * (R + 1) / 2;
  using Meet = Meeting<T, P>;
  typename Meet::PerRound total;
  typename Meet::PerPair sums;
  const T* a[R];
  tile_rows<T, R>(rows, 0, 0, 0, a);
  share.each_chunk(units, [&](int64_t slot, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk), first = ordinal * kSubSteps;
    const bool whole = end - chunk * kChunk == kChunk;
    const int here = kept_of(kept, ordinal);
    if (chunk == slot * units.group) Meet::clear(block, total);
    block.each([&](int t) {
      const int64_t at = chunk * kChunk + chain_start<T>(t);
#pragma unroll
      for (int e = 0; e < P; ++e) sums(t)[e] = 0;
      auto from_kept = [&](int s, int64_t, Acc<T>* x, Acc<T>*) {
#pragma unroll
        for (int i = 0; i < R; ++i) x[i] = a[i] ? number(kept.at(first + s, i, t)) : Acc<T>(0);
      };
      auto from_memory = [&](int, int64_t e, Acc<T>* x, Acc<T>*) {
#pragma unroll
        for (int i = 0; i < R; ++i) x[i] = a[i] ? number(a[i] + e) : Acc<T>(0);
      };
      for (int s = 0; s < here;) {
        const int64_t reach = await(kept, first + s) - first;
        const int stop = reach < here ? static_cast<int>(reach) : here;
        chain_steps<T, R, 0>(s, stop, at, end, whole, from_kept, sums(t));
        s = stop;
      }
      chain_steps<T, R, 0>(here, kSubSteps, at, end, whole, from_memory, sums(t));
    });
    Meet::add(block, sums, shared, total);
    if (chunk + 1 == (slot + 1) * units.group || chunk + 1 == units.count) put_pairs<T, R, 0>(block, rows.k, 0, 0, total, slots.own(slot, pair_count(rows.k)));
  });
}

// The Gramian [K, K] of rows at their places, from the slots of all blocks in order; they come by way of `stage`, which holds `room` numbers,
// for one after the other would wait for memory each time.
MMFAST_BLOCK inline void fold_few(const Block& block, const FewRows& rows, int K, const Slots& slots, int64_t count, double* stage, int room, double* G) {
  constexpr int kOnce = 8;
  const int pairs = static_cast<int>(pair_count(rows.k)), fit = room / pairs;
  Block::Per<double> total;
  block.each([&](int t) { total(t) = 0.0; });
  for (int64_t s = 0; s < count; s += fit) {
    const int some = static_cast<int>(count - s < fit ? count - s : fit), numbers = some * pairs;
    block.sync();
    for (int base = 0; base < numbers; base += kOnce * kThreads)
      block.each([&](int t) {
        double x[kOnce];
#pragma unroll
        for (int u = 0; u < kOnce; ++u) {
          const int e = base + u * kThreads + t;
          x[u] = e < numbers ? slots.read(static_cast<unsigned>(s) + e / pairs, pairs, e % pairs) : 0.0;
        }
#pragma unroll
        for (int u = 0; u < kOnce; ++u)
          if (base + u * kThreads + t < numbers) stage[base + u * kThreads + t] = x[u];
      });
    block.sync();
    block.each([&](int t) {
      if (t < pairs)
#pragma unroll 4
        for (int i = 0; i < some; ++i) total(t) += stage[i * pairs + t];
    });
  }
  block.sync();
  block.each([&](int t) {
    if (t < pairs) stage[t] = total(t);
  });
  block.sync();
  block.each([&](int t) {
    for (int e = t; e < K * K; e += kThreads) {
      int i = -1, j = -1;
      for (int row = 0; row < rows.k; ++row) {
        if (rows.places[row] == e / K) i = row;
        if (rows.places[row] == e % K) j = row;
      }
      const bool hidden = rows.mask && !(rows.mask[e / K] && rows.mask[e % K]);
      G[e] = i < 0 || j < 0 || hidden ? 0.0 : stage[pair_index(rows.k, i < j ? i : j, i < j ? j : i)];
    }
  });
}

// The rows that enter the sum: where they are in memory, and where their first kept number is.
template <class T>
struct Entering {
  const T *memory[kPersistentRows], *kept[kPersistentRows];
  Acc<T> weight[kPersistentRows];
  int count;
};

// Elements e + i * L of the result below `end`, i below kStepsAtOnce; the rows' numbers stand at `from`, `stride` apart.
template <class T>
MMFAST_BLOCK inline void combine_steps(const T* const* rows, const Entering<T>& in, int64_t from, int stride, int64_t e, int64_t end, T* out) {
  constexpr int L = 64 / sizeof(Acc<T>);
  Acc<T> sum[kStepsAtOnce];
  if (e + (kStepsAtOnce - 1) * L < end) {
    weighted<T, kStepsAtOnce>(rows, in.weight, in.count, from, stride, sum);
#pragma unroll
    for (int i = 0; i < kStepsAtOnce; ++i) put(out + e + i * L, sum[i]);
  } else {
    for (int i = 0; i < kStepsAtOnce && e + i * L < end; ++i) {
      weighted<T, 1>(rows, in.weight, in.count, from + i * stride, stride, sum);
      put(out + e + i * L, sum[0]);
    }
  }
}

// The weighted sum over the block's chunks: first what must be read again, the newest first, then what was kept.
template <class T>
MMFAST_BLOCK inline void combine_kept(const Block& block, const FewRows& rows, const Units& units, const Share& share, const Kept<T>& kept, const double* w, Entering<T>& in,
                                      T* out) {
  constexpr int L = 64 / sizeof(Acc<T>);
  block.each([&](int t) {
    if (t) return;
    in.count = 0;
    for (int i = 0; i < rows.k; ++i)
      if (enters(rows, i, w, rows.mask, true)) {
        in.memory[in.count] = static_cast<const T*>(rows.at[i]);
        in.kept[in.count] = kept.at(0, i, 0);
        in.weight[in.count++] = static_cast<Acc<T>>(w[rows.places[i]]);
      }
  });
  block.sync();
  share.each_chunk_back(units, [&](int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk);
    const int here = kept_of(kept, ordinal);
    block.each([&](int t) {
      for (int s = kSubSteps - kStepsAtOnce; s >= here; s -= kStepsAtOnce) {
        const int64_t e = chunk * kChunk + chain_start<T>(t) + s * L;
        combine_steps<T>(in.memory, in, e, L, e, end, out);
      }
    });
  });
  share.each_chunk(units, [&](int64_t, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk);
    const int here = kept_of(kept, ordinal), apart = rows.k * kThreads;
    block.each([&](int t) {
      for (int s = 0; s < here; s += kStepsAtOnce)
        combine_steps<T>(in.kept, in, (ordinal * kSubSteps + s) * apart + t, apart, chunk * kChunk + chain_start<T>(t) + s * L, end, out);
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
