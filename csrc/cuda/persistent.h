// One launch that reads the gradients once: each block stages what it reads in shared memory, adds it up, and after the Gramian is known combines
// what it staged. What does not fit is read again, the newest first. The order of all sums is that of gram.h and combine.h.
#pragma once

#include "combine.h"
#include "plan.h"

namespace mmfast {
namespace MMFAST_ISA {

static_assert(kThreads == kPersistentThreads && kThreads * kSubSteps == kChunk, "a step of a chunk is one element of every row and thread");

using FewRows = RowsUpTo<kPersistentRows>;

// What a block has staged in shared memory: the first `steps` steps of its chunks, [steps, k, kThreads]. A thread reads and writes its own elements only.
template <class T>
struct Staged {
  static constexpr int kGroups = 4;  // in which they arrive
  T* data;
  int64_t steps;
  int k;
  MMFAST_BLOCK T* ptr(int64_t step, int row, int thread) const { return data + (step * k + row) * kThreads + thread; }
  MMFAST_BLOCK int64_t group_end(int group) const { return steps * (group + 1) / kGroups; }
  // Steps that are staged of the block's chunk number `ordinal`.
  MMFAST_BLOCK int steps_of_chunk(int64_t ordinal) const {
    const int64_t left = steps - ordinal * kSubSteps;
    return static_cast<int>(left < 0 ? 0 : left < kSubSteps ? left : kSubSteps);
  }
};

// The chunks of one block: those of slots `block`, block + blocks, ...
struct BlockChunks {
  int64_t block, blocks;
  // f(slot, chunk, ordinal among the block's chunks), in order
  template <class F>
  MMFAST_BLOCK void for_each(const Units& units, F f) const {
    int64_t ordinal = 0;
    for (int64_t slot = block; slot < units.slots(); slot += blocks)
      for (int64_t chunk = slot * units.group; chunk < (slot + 1) * units.group && chunk < units.count; ++chunk) f(slot, chunk, ordinal++);
  }
  // f(chunk, ordinal), the last first
  template <class F>
  MMFAST_BLOCK void for_each_reverse(const Units& units, F f) const {
    const int64_t slots = units.slots(), block_slots = (slots - block + blocks - 1) / blocks;
    for (int64_t i = block_slots - 1; i >= 0; --i)
      for (int64_t c = units.group - 1; c >= 0; --c) {
        const int64_t chunk = (block + i * blocks) * units.group + c;
        if (chunk < units.count) f(chunk, i * units.group + c);
      }
  }
};

// Where the pair sums of the slots are: one after the other in memory, or, in a cluster, each in the shared memory of the block that sums it.
struct Slots {
  double* partials;
  unsigned cluster_blocks;  // that share them out as BlockChunks says; 0 in memory
  // fewer than 2^32 of them, and so short divisions
  MMFAST_BLOCK double* ptr(int64_t slot, int64_t pairs) const { return partials + (cluster_blocks ? static_cast<unsigned>(slot) / cluster_blocks : slot) * pairs; }
  MMFAST_BLOCK double load(unsigned slot, unsigned pairs, unsigned pair) const {
    return cluster_blocks ? peer_shared(partials, slot % cluster_blocks)[slot / cluster_blocks * pairs + pair] : load_partial(partials + static_cast<int64_t>(slot) * pairs + pair);
  }
};

// The element at which a chunk ends, or the gradient.
MMFAST_HD inline int64_t chunk_end(const Units& units, int64_t chunk) { return (chunk + 1) * kChunk < units.elements ? (chunk + 1) * kChunk : units.elements; }

// Starts the copies of all that is staged, in groups. Where a row is masked or ends, nothing is copied, and nothing is read later.
template <class T, int R>
MMFAST_BLOCK inline void prefetch(const Block& block, const FewRows& rows, const Units& units, const BlockChunks& chunks, const Staged<T>& staged) {
  constexpr int L = kLanes<T>, U = kCombineUnroll;
  const T* a[R];
  tile_row_ptrs<T, R>(rows, 0, 0, 0, a);
  int group = 0;
  chunks.for_each(units, [&](int64_t, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk), first = ordinal * kSubSteps;
    for (int s = 0; s < staged.steps_of_chunk(ordinal); s += U) {
      block.each_thread([&](int t) {
        const int64_t e = chunk * kChunk + chain_start<T>(t) + s * L;
        T* to = staged.ptr(first + s, 0, t);
        if constexpr (sizeof(T) >= 4) {
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int u = 0; u < U; ++u)
              if (a[i] && e + u * L < end) cp_async(to + (u * staged.k + i) * kThreads, a[i] + e + u * L);
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
              if (a[i]) to[(u * staged.k + i) * kThreads] = x[i * U + u];
        }
      });
      for (; group < Staged<T>::kGroups && first + s + U >= staged.group_end(group); ++group) commit_group();
    }
  });
  for (; group < Staged<T>::kGroups; ++group) commit_group();
}

// Waits for the group that a step is staged in, and returns the step at which that group ends.
template <class T>
MMFAST_BLOCK inline int64_t wait_staged(const Staged<T>& staged, int64_t step) {
  if (step < staged.group_end(0)) return wait_group<3>(), staged.group_end(0);
  if (step < staged.group_end(1)) return wait_group<2>(), staged.group_end(1);
  if (step < staged.group_end(2)) return wait_group<1>(), staged.group_end(2);
  return wait_group<0>(), staged.steps;
}

// Pair sums of the block's slots at pair_index, written to where the slots are.
template <class T, int R>
MMFAST_BLOCK inline void sum_staged(const Block& block, const FewRows& rows, const Units& units, const BlockChunks& chunks, const Staged<T>& staged, Acc<T>* shared,
                                    const Slots& slots) {
  constexpr int P = R * (R + 1) / 2;
  using Reduce = ChainReduce<T, P>;
  typename Reduce::PairSums slot_sums;
  typename Reduce::ChainSums chain_sums;
  const T* a[R];
  tile_row_ptrs<T, R>(rows, 0, 0, 0, a);
  chunks.for_each(units, [&](int64_t slot, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk), first = ordinal * kSubSteps;
    const bool whole = end - chunk * kChunk == kChunk;
    const int staged_steps = staged.steps_of_chunk(ordinal);
    if (chunk == slot * units.group) Reduce::clear(block, slot_sums);
    block.each_thread([&](int t) {
      const int64_t start = chunk * kChunk + chain_start<T>(t);
#pragma unroll
      for (int e = 0; e < P; ++e) chain_sums(t)[e] = 0;
      auto load_staged = [&](int s, int64_t, Acc<T>* x, Acc<T>*) {
#pragma unroll
        for (int i = 0; i < R; ++i) x[i] = a[i] ? load_acc(staged.ptr(first + s, i, t)) : Acc<T>(0);
      };
      auto load_global = [&](int, int64_t e, Acc<T>* x, Acc<T>*) {
#pragma unroll
        for (int i = 0; i < R; ++i) x[i] = a[i] ? load_acc(a[i] + e) : Acc<T>(0);
      };
      for (int s = 0; s < staged_steps;) {
        const int64_t arrived = wait_staged(staged, first + s) - first;
        const int stop = arrived < staged_steps ? static_cast<int>(arrived) : staged_steps;
        chain_steps<T, R, 0>(s, stop, start, end, whole, load_staged, chain_sums(t));
        s = stop;
      }
      chain_steps<T, R, 0>(staged_steps, kSubSteps, start, end, whole, load_global, chain_sums(t));
    });
    Reduce::add(block, chain_sums, shared, slot_sums);
    if (chunk + 1 == (slot + 1) * units.group || chunk + 1 == units.count) store_pairs<T, R, 0>(block, rows.k, 0, 0, slot_sums, slots.ptr(slot, pair_count(rows.k)));
  });
}

// The Gramian [K, K] of few rows by one block, from the `count` slots of all blocks in order; they come by way of `buffer`, which has room for `size`
// doubles, for one after the other would wait for memory each time.
MMFAST_BLOCK inline void fold_slots_by_block(const Block& block, const FewRows& rows, int K, const Slots& slots, int64_t count, double* buffer, int size, double* G) {
  constexpr int kInFlight = 8;
  const int pairs = static_cast<int>(pair_count(rows.k)), max_slots = size / pairs;
  Block::PerThread<double> pair_sum;
  block.each_thread([&](int t) { pair_sum(t) = 0.0; });
  for (int64_t s = 0; s < count; s += max_slots) {
    const int n_slots = static_cast<int>(count - s < max_slots ? count - s : max_slots), n = n_slots * pairs;
    block.sync();
    for (int base = 0; base < n; base += kInFlight * kThreads)
      block.each_thread([&](int t) {
        double x[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          const int e = base + u * kThreads + t;
          x[u] = e < n ? slots.load(static_cast<unsigned>(s) + e / pairs, pairs, e % pairs) : 0.0;
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (base + u * kThreads + t < n) buffer[base + u * kThreads + t] = x[u];
      });
    block.sync();
    block.each_thread([&](int t) {
      if (t < pairs)
#pragma unroll 4
        for (int i = 0; i < n_slots; ++i) pair_sum(t) += buffer[i * pairs + t];
    });
  }
  block.sync();
  block.each_thread([&](int t) {
    if (t < pairs) buffer[t] = pair_sum(t);
  });
  block.sync();
  block.each_thread([&](int t) {
    for (int e = t; e < K * K; e += kThreads) {
      int i = -1, j = -1;
      for (int row = 0; row < rows.k; ++row) {
        if (rows.row_index[row] == e / K) i = row;
        if (rows.row_index[row] == e % K) j = row;
      }
      const bool hidden = rows.mask && !(rows.mask[e / K] && rows.mask[e % K]);
      G[e] = i < 0 || j < 0 || hidden ? 0.0 : buffer[pair_index(rows.k, i < j ? i : j, i < j ? j : i)];
    }
  });
}

// The rows that take part in the sum: where they are in memory, and where their first staged element is.
template <class T>
struct ActiveRows {
  const T *global[kPersistentRows], *staged[kPersistentRows];
  Acc<T> weight[kPersistentRows];
  int count;
};

// Elements e + i * L of the result below `end`, i below kCombineUnroll; the rows' elements are at `from`, `stride` apart.
template <class T>
MMFAST_BLOCK inline void combine_steps(const T* const* rows, const ActiveRows<T>& active, int64_t from, int stride, int64_t e, int64_t end, T* out) {
  constexpr int L = kLanes<T>;
  Acc<T> sum[kCombineUnroll];
  if (e + (kCombineUnroll - 1) * L < end) {
    weighted_sum<T, kCombineUnroll>(rows, active.weight, active.count, from, stride, sum);
#pragma unroll
    for (int i = 0; i < kCombineUnroll; ++i) store_acc(out + e + i * L, sum[i]);
  } else {
    for (int i = 0; i < kCombineUnroll && e + i * L < end; ++i) {
      weighted_sum<T, 1>(rows, active.weight, active.count, from + i * stride, stride, sum);
      store_acc(out + e + i * L, sum[0]);
    }
  }
}

// The weighted sum over the block's chunks: first what must be read again, the newest first, then what is staged.
template <class T>
MMFAST_BLOCK inline void combine_staged(const Block& block, const FewRows& rows, const Units& units, const BlockChunks& chunks, const Staged<T>& staged, const double* w,
                                        ActiveRows<T>& active, T* out) {
  constexpr int L = kLanes<T>;
  block.each_thread([&](int t) {
    if (t) return;
    active.count = 0;
    for (int i = 0; i < rows.k; ++i)
      if (is_active(rows, i, w, rows.mask, true)) {
        active.global[active.count] = static_cast<const T*>(rows.ptr[i]);
        active.staged[active.count] = staged.ptr(0, i, 0);
        active.weight[active.count++] = static_cast<Acc<T>>(w[rows.row_index[i]]);
      }
  });
  block.sync();
  chunks.for_each_reverse(units, [&](int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk);
    const int staged_steps = staged.steps_of_chunk(ordinal);
    block.each_thread([&](int t) {
      for (int s = kSubSteps - kCombineUnroll; s >= staged_steps; s -= kCombineUnroll) {
        const int64_t e = chunk * kChunk + chain_start<T>(t) + s * L;
        combine_steps<T>(active.global, active, e, L, e, end, out);
      }
    });
  });
  chunks.for_each(units, [&](int64_t, int64_t chunk, int64_t ordinal) {
    const int64_t end = chunk_end(units, chunk);
    const int staged_steps = staged.steps_of_chunk(ordinal), step_stride = rows.k * kThreads;
    block.each_thread([&](int t) {
      for (int s = 0; s < staged_steps; s += kCombineUnroll)
        combine_steps<T>(active.staged, active, (ordinal * kSubSteps + s) * step_stride + t, step_stride, chunk * kChunk + chain_start<T>(t) + s * L, end, out);
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
