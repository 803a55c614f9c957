// The Gramian of k rows of n numbers. Inside a chunk: per pair 16 float (8 double) lanes, chains of 32 fused multiply-adds, the chains
// of a chunk added lane by lane in order, the lanes met in a tree; across chunks: double, in order (gramian.h).
// No order here depends on register width, tile shape or thread, so all of these give the same bits.
#pragma once

#include "../gramian.h"
#include "panels.h"
#include "pool.h"

namespace mmfast {
namespace MMFAST_ISA {

// Chunks read side by side, far apart where they may be: one or two rows alone are too few streams from memory, and too few chains.
template <int k>
constexpr int kAbreast = k == 1 ? 4 : k == 2 ? 2 : 1;

// All pairs of k rows in one sweep, of `abreast` chunks at once; `parts` parts of a step at a time, as many as have room in registers.
// Rows are T, converted on the way; those of chunk u stand at rows[u * k], its lanes at lanes[u * pairs].
template <class T, int k, int abreast, class V>
inline void triangle(const T* const* rows, int steps, typename V::Acc* lanes) {
  constexpr int L = V::width * V::parts, P = k * (k + 1) / 2, parts = abreast * P * V::parts <= 12 ? V::parts : 1;
  const T* p[abreast * k];
  for (int i = 0; i < abreast * k; ++i) p[i] = rows[i];
  for (int part = 0; part < V::parts; part += parts) {
    typename V::Reg acc[abreast * parts * P];
#pragma GCC unroll 32
    for (int e = 0; e < abreast * parts * P; ++e) acc[e] = V::zero();
    for (int64_t t = part * V::width; t < static_cast<int64_t>(steps) * L; t += L)
#pragma GCC unroll 8
      for (int u = 0; u < abreast * parts; ++u) {
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
    for (int e = 0; e < abreast * parts * P; ++e) {
      typename V::Acc* to = lanes + (e / (parts * P) * P + e % P) * L + (part + e / P % parts) * V::width;
      V::store(to, V::add(V::load(to), acc[e]));
    }
  }
}

// Elements [begin, end) of a row as whole steps of accumulator numbers, zeros behind the end.
template <class T>
inline void pack(const T* row, int64_t begin, int64_t end, int steps, typename Stored<T>::Vec::Acc* out) {
  using V = typename Stored<T>::Vec;
  const int64_t n = end - begin;
  int64_t t = 0;
  for (; t + V::width <= n; t += V::width) V::store(out + t, V::load(row + begin + t));
  for (; t < n; ++t) read(row + begin + t, out + t);
  for (; t < static_cast<int64_t>(steps) * kStep<T>; ++t) out[t] = 0;
}

// Adds the Gramians of `abreast` chunks from `chunk` on, `apart` from each other; all of them are whole if there are several.
template <class T, int k, int abreast, class AccOf>
inline void chunk_triangle(const T* const* rows, int64_t n, int64_t chunk, int64_t apart, const AccOf& acc_of) {
  using V = typename Stored<T>::Vec;
  using Acc = typename V::Acc;
  constexpr int L = kStep<T>, P = k * (k + 1) / 2, kStretch = kSubSteps * L;
  alignas(64) Acc lanes[abreast * P * L] = {};
  const int64_t begin = chunk * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  for (int64_t s = begin; s < end; s += kStretch) {
    const int64_t stop = end - s < kStretch ? end : s + kStretch;
    const int steps = static_cast<int>((stop - s + L - 1) / L);
    if (stop - s == static_cast<int64_t>(steps) * L) {
      const T* at[abreast * k];
      for (int i = 0; i < abreast * k; ++i) at[i] = rows[i % k] + s + i / k * apart * kChunk;
      triangle<T, k, abreast, V>(at, steps, lanes);
    } else {  // the last step of a row is not whole
      alignas(64) Acc packed[k * kStretch];
      const Acc* at[k];
      for (int i = 0; i < k; ++i) {
        pack(rows[i], s, stop, steps, packed + i * kStretch);
        at[i] = packed + i * kStretch;
      }
      triangle<Acc, k, 1, V>(at, steps, lanes);
    }
  }
  for (int u = 0; u < abreast; ++u) {
    double* out = acc_of(chunk + u * apart);
    for (int e = 0; e < P; ++e) out[e] += fold(lanes + (u * P + e) * L);
  }
}

template <class T, int k, class AccOf>
inline void chunks_triangle(const T* const* rows, int64_t n, int64_t first, int64_t last, bool by_slots, const AccOf& acc_of) {
  constexpr int abreast = kAbreast<k>;
  const int64_t whole = last * kChunk <= n ? last : n / kChunk, group = by_slots ? group_size((n + kChunk - 1) / kChunk) : 1;
  // chunks of one slot come in order, so streams that begin at different slots may run side by side; next to each other they would all stop
  // and begin anew every few pages, which takes a fifth of the time where memory is fast
  if (const int64_t apart = by_slots && abreast > 1 ? (whole - first) / (abreast * group) * group : 0) {
    for (int64_t i = 0; i < apart; ++i) chunk_triangle<T, k, abreast>(rows, n, first + i, apart, acc_of);
    first += abreast * apart;
  }
  for (; abreast > 1 && first + abreast <= whole; first += abreast) chunk_triangle<T, k, abreast>(rows, n, first, 1, acc_of);
  for (; first < last; ++first) chunk_triangle<T, k, 1>(rows, n, first, 1, acc_of);
}

// Adds the Gramians of chunks [first, last) of k rows of n elements; acc_of(chunk) says where to. They come in order, or by_slots: in order inside
// each slot, with whole slots in the range.
template <class T, class AccOf>
inline void gram_chunks(const T* const* rows, int k, int64_t n, int64_t first, int64_t last, bool by_slots, const AccOf& acc_of) {
  switch (k) {
    case 1: return chunks_triangle<T, 1>(rows, n, first, last, by_slots, acc_of);
    case 2: return chunks_triangle<T, 2>(rows, n, first, last, by_slots, acc_of);
    case 3: return chunks_triangle<T, 3>(rows, n, first, last, by_slots, acc_of);
    case 4: return chunks_triangle<T, 4>(rows, n, first, last, by_slots, acc_of);
#if defined(__AVX512F__)
    case 5: return chunks_triangle<T, 5>(rows, n, first, last, by_slots, acc_of);
    case 6: return chunks_triangle<T, 6>(rows, n, first, last, by_slots, acc_of);
#endif
    default: return gram_panels(rows, k, n, first, last, acc_of);
  }
}

// Sums units 0..units-1 in the order of gramian.h; range(first, last, by_slots, acc_of) adds those of unit u to acc_of(u), in order, or by_slots
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
  double* all = arena.take<double>(slots * pairs);
  auto part = [&](int64_t begin, int64_t end) {
    range(begin * group, end * group < units ? end * group : units, true, [&](int64_t u) {
      double* slot = all + u / group * pairs;
      return u % group == 0 ? clear(slot) : slot;
    });
  };
  run(pool, slots, work, part);
  for (int64_t s = 0; s < slots; ++s) add(all + s * pairs);
}

template <class T>
inline void gram_rows(const Pool& pool, const T* const* rows, int k, int64_t n, double* total) {
  sum_units(
      pool, (n + kChunk - 1) / kChunk, n * k, pair_count(k),
      [&](int64_t first, int64_t last, bool by_slots, const auto& acc_of) {
        if (k > 0 && first < last) gram_chunks<T>(rows, k, n, first, last, by_slots, acc_of);
      },
      total);
}

// Pairs of the k rows at places[] to the full symmetric G [K, K]; the other rows and columns become zero.
inline void spread(const double* pairs, int k, const int* places, int K, double* G) {
  if (k < K)
    for (int64_t e = 0; e < static_cast<int64_t>(K) * K; ++e) G[e] = 0.0;
  for (int i = 0; i < k; ++i)
    for (int j = i; j < k; ++j) {
      const double g = pairs[pair_index(k, i, j)];
      G[static_cast<int64_t>(places[i]) * K + places[j]] = g;
      G[static_cast<int64_t>(places[j]) * K + places[i]] = g;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
