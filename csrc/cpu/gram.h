// The Gramian of k rows of n numbers. Inside a chunk: per pair 16 float (8 double) lanes, chains of 32 fused multiply-adds, the chains
// of a chunk added lane by lane in order, the lanes met in a tree; across chunks: double, in order (gramian.h).
// No order here depends on register width, tile shape or thread, so all of these give the same bits.
#pragma once

#include "../gramian.h"
#include "panels.h"
#include "pool.h"

namespace mmfast {
namespace MMFAST_ISA {

// Chunks whose sums are interleaved, far apart where they may be: one or two rows alone are too few streams from memory, and too few chains.
template <int k>
constexpr int kInterleave = k == 1 ? 4 : k == 2 ? 2 : 1;

// All pairs of k rows in one sweep, of `interleave` chunks at once; `parts` parts of a step at a time, as many as have room in registers.
// Rows are T, converted on the way; those of chunk u stand at rows[u * k], its lanes at lanes[u * pairs].
template <class T, int k, int interleave>
inline void triangle(const T* const* rows, int steps, Acc<T>* lanes) {
  using V = Vec<T>;
  constexpr int L = V::width * V::parts, P = k * (k + 1) / 2, parts = interleave * P * V::parts <= 12 ? V::parts : 1;
  const T* p[interleave * k];
  for (int i = 0; i < interleave * k; ++i) p[i] = rows[i];
  for (int part = 0; part < V::parts; part += parts) {
    typename V::Reg acc[interleave * parts * P];
#pragma GCC unroll 32
    for (int e = 0; e < interleave * parts * P; ++e) acc[e] = V::zero();
    for (int64_t t = part * V::width; t < static_cast<int64_t>(steps) * L; t += L)
#pragma GCC unroll 8
      for (int u = 0; u < interleave * parts; ++u) {
        typename V::Reg x[k];
#pragma GCC unroll 8
        for (int i = 0; i < k; ++i) x[i] = V::load(p[u / parts * k + i] + t + u % parts * V::width);
#pragma GCC unroll 8
        for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
          for (int j = i; j < k; ++j) {
            const int e = u * P + i * k - i * (i - 1) / 2 + (j - i);
            acc[e] = V::fma(x[i], x[j], acc[e]);
          }
      }
#pragma GCC unroll 32
    for (int e = 0; e < interleave * parts * P; ++e) {
      Acc<T>* to = lanes + (e / (parts * P) * P + e % P) * L + (part + e / P % parts) * V::width;
      V::store(to, V::add(V::load(to), acc[e]));
    }
  }
}

// Elements [begin, end) of a row as whole steps of accumulators, zeros behind the end.
template <class T>
inline void pack(const T* row, int64_t begin, int64_t end, int steps, Acc<T>* out) {
  load_row(row + begin, end - begin, out);
  for (int64_t t = end - begin; t < static_cast<int64_t>(steps) * kLanes<T>; ++t) out[t] = 0;
}

// Adds the Gramians of `interleave` chunks from `chunk` on, `chunk_stride` from each other; all of them are whole if there are several.
template <class T, int k, int interleave, class SlotOf>
inline void chunk_triangle(const T* const* rows, int64_t n, int64_t chunk, int64_t chunk_stride, const SlotOf& slot_of) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, P = k * (k + 1) / 2, kStretch = kSubSteps * L;
  alignas(64) A lanes[interleave * P * L] = {};
  const int64_t begin = chunk * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  for (int64_t s = begin; s < end; s += kStretch) {
    const int64_t stop = end - s < kStretch ? end : s + kStretch;
    const int steps = static_cast<int>((stop - s + L - 1) / L);
    if (stop - s == static_cast<int64_t>(steps) * L) {
      const T* stretch_rows[interleave * k];
      for (int i = 0; i < interleave * k; ++i) stretch_rows[i] = rows[i % k] + s + i / k * chunk_stride * kChunk;
      triangle<T, k, interleave>(stretch_rows, steps, lanes);
    } else {  // the last step of a row is not whole
      alignas(64) A packed[k * kStretch];
      const A* packed_rows[k];
      for (int i = 0; i < k; ++i) {
        pack(rows[i], s, stop, steps, packed + i * kStretch);
        packed_rows[i] = packed + i * kStretch;
      }
      triangle<A, k, 1>(packed_rows, steps, lanes);
    }
  }
  for (int u = 0; u < interleave; ++u) {
    double* slot = slot_of(chunk + u * chunk_stride);
    for (int e = 0; e < P; ++e) slot[e] += reduce_lanes(lanes + (u * P + e) * L);
  }
}

template <class T, int k, class SlotOf>
inline void chunks_triangle(const T* const* rows, int64_t n, int64_t first, int64_t last, bool by_slots, const SlotOf& slot_of) {
  constexpr int interleave = kInterleave<k>;
  const int64_t whole = last * kChunk <= n ? last : n / kChunk, group = by_slots ? group_size((n + kChunk - 1) / kChunk) : 1;
  // chunks of one slot come in order, so streams that begin at different slots may run side by side; next to each other they would all stop
  // and begin anew every few pages, which takes a fifth of the time where memory is fast
  if (const int64_t chunk_stride = by_slots && interleave > 1 ? (whole - first) / (interleave * group) * group : 0) {
    for (int64_t i = 0; i < chunk_stride; ++i) chunk_triangle<T, k, interleave>(rows, n, first + i, chunk_stride, slot_of);
    first += interleave * chunk_stride;
  }
  for (; interleave > 1 && first + interleave <= whole; first += interleave) chunk_triangle<T, k, interleave>(rows, n, first, 1, slot_of);
  for (; first < last; ++first) chunk_triangle<T, k, 1>(rows, n, first, 1, slot_of);
}

// Adds the Gramians of chunks [first, last) of k rows of n elements; slot_of(chunk) says where to. They come in order, or by_slots: in order inside
// each slot, with whole slots in the range.
template <class T, class SlotOf>
inline void gram_chunks(const T* const* rows, int k, int64_t n, int64_t first, int64_t last, bool by_slots, const SlotOf& slot_of) {
  switch (k) {
    case 1: return chunks_triangle<T, 1>(rows, n, first, last, by_slots, slot_of);
    case 2: return chunks_triangle<T, 2>(rows, n, first, last, by_slots, slot_of);
    case 3: return chunks_triangle<T, 3>(rows, n, first, last, by_slots, slot_of);
    case 4: return chunks_triangle<T, 4>(rows, n, first, last, by_slots, slot_of);
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
    case 5: return chunks_triangle<T, 5>(rows, n, first, last, by_slots, slot_of);
    case 6: return chunks_triangle<T, 6>(rows, n, first, last, by_slots, slot_of);
#endif
    default: return gram_panels(rows, k, n, first, last, slot_of);
  }
}

// Sums units 0..units-1 in the order of gramian.h; range(first, last, by_slots, slot_of) adds those of unit u to slot_of(u), in order, or by_slots
// as gram_chunks says. `work` decides whether threads pay.
template <class Range>
inline void sum_units(const Pool& pool, int64_t units, int64_t work, int64_t pairs, const Range& range, double* total) {
  const int64_t group = group_size(units), slots = (units + group - 1) / group;
  Arena arena;
  for (int64_t e = 0; e < pairs; ++e) total[e] = 0.0;
  auto clear = [&](double* slot) {
    for (int64_t e = 0; e < pairs; ++e) slot[e] = 0.0;
    return slot;
  };
  auto add = [&](const double* slot) {
    for (int64_t e = 0; e < pairs; ++e) total[e] += slot[e];
  };
  // one thread keeps one slot at a time, but for the few pairs of one or two rows, which are read by slots
  if (work <= kSmallWork || slots <= 1 || (pool.threads == 1 && pairs > 3)) {
    double* slot = clear(arena.take<double>(pairs));
    range(0, units, false, [&](int64_t u) {
      if (u > 0 && u % group == 0) {
        add(slot);
        clear(slot);
      }
      return slot;
    });
    add(slot);
    return;
  }
  double* sums = arena.take<double>(slots * pairs);
  auto part = [&](int64_t begin, int64_t end) {
    range(begin * group, end * group < units ? end * group : units, true, [&](int64_t u) {
      double* slot = sums + u / group * pairs;
      return u % group == 0 ? clear(slot) : slot;
    });
  };
  parallel_for(pool, slots, work, part);
  for (int64_t s = 0; s < slots; ++s) add(sums + s * pairs);
}

template <class T>
inline void gram_rows(const Pool& pool, const T* const* rows, int k, int64_t n, double* total) {
  sum_units(
      pool, (n + kChunk - 1) / kChunk, n * k, pair_count(k),
      [&](int64_t first, int64_t last, bool by_slots, const auto& slot_of) {
        if (k > 0 && first < last) gram_chunks<T>(rows, k, n, first, last, by_slots, slot_of);
      },
      total);
}

// Pairs of the k rows row_index[] to the full symmetric G [K, K]; the other rows and columns become zero.
inline void scatter_pairs(const double* pairs, int k, const int* row_index, int K, double* G) {
  if (k < K)
    for (int64_t e = 0; e < static_cast<int64_t>(K) * K; ++e) G[e] = 0.0;
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) {
      const double g = pairs[pair_index(k, i, j)];
      G[static_cast<int64_t>(row_index[i]) * K + row_index[j]] = g;
      G[static_cast<int64_t>(row_index[j]) * K + row_index[i]] = g;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
