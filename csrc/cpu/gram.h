// The Gramian of k rows of n numbers. Inside a chunk: per pair 16 float (8 double) lanes, chains of 32 fused multiply-adds, the chains
// of a chunk added lane by lane in order, the lanes met in a tree; across chunks: double, in order (gramian.h).
// No order here depends on register width, tile shape or thread, so all of these give the same bits.
#pragma once

#include <type_traits>

#include "../gramian.h"
#include "panels.h"
#include "pool.h"

namespace mmfast {
namespace MMFAST_ISA {

#if defined(__AVX512F__)
constexpr int kTriangle = 6;  // 21 accumulators in 32 registers
#else
constexpr int kTriangle = 4;  // 10 in 16
#endif

template <class V>
MMFAST_INLINE void add_lanes(typename V::Acc* lanes, typename V::Reg sum) {
  V::store(lanes, V::add(V::load(lanes), sum));
}

// All pairs of k rows in one sweep.
template <class V, int k>
inline void triangle(const typename V::Acc* const* rows, int steps, typename V::Acc* lanes) {
  constexpr int L = V::width * V::parts;
  const typename V::Acc* p[k];
  for (int i = 0; i < k; ++i) p[i] = rows[i];
  for (int part = 0; part < V::parts; ++part) {
    typename V::Reg acc[k * (k + 1) / 2];
#pragma GCC unroll 32
    for (int e = 0; e < k * (k + 1) / 2; ++e) acc[e] = V::zero();
    for (int64_t t = part * V::width; t < static_cast<int64_t>(steps) * L; t += L) {
      typename V::Reg x[k];
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i) x[i] = V::load(p[i] + t);
#pragma GCC unroll 8
      for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
        for (int j = i; j < k; ++j) {
          const int e = i * k - i * (i - 1) / 2 + (j - i);
          acc[e] = V::fma(x[i], x[j], acc[e]);
        }
    }
#pragma GCC unroll 32
    for (int e = 0; e < k * (k + 1) / 2; ++e) add_lanes<V>(lanes + e * L + part * V::width, acc[e]);
  }
}

// One row alone, kAbreast stretches side by side: one chain, and one stream from memory, would leave the processor waiting.
constexpr int kAbreast = 4;
template <class V>
inline void square(const typename V::Acc* row, typename V::Acc* lanes) {
  constexpr int L = V::width * V::parts, kStretch = kSubSteps * L;
  for (int part = 0; part < V::parts; ++part) {
    typename V::Reg acc[kAbreast];
#pragma GCC unroll 4
    for (int u = 0; u < kAbreast; ++u) acc[u] = V::zero();
    for (int64_t t = part * V::width; t < kStretch; t += L)
#pragma GCC unroll 4
      for (int u = 0; u < kAbreast; ++u) {
        const typename V::Reg x = V::load(row + u * kStretch + t);
        acc[u] = V::fma(x, x, acc[u]);
      }
#pragma GCC unroll 4
    for (int u = 0; u < kAbreast; ++u) add_lanes<V>(lanes + part * V::width, acc[u]);
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

// Row pointers of one stretch of a chunk: straight into the data where that is possible, else into packed copies.
template <class T>
inline void stretch_rows(const T* const* rows, int k, int64_t begin, int64_t end, int steps, typename Stored<T>::Vec::Acc* packed,
                         const typename Stored<T>::Vec::Acc** out) {
  using Acc = typename Stored<T>::Vec::Acc;
  if constexpr (std::is_same<T, Acc>::value) {
    if (end - begin == static_cast<int64_t>(steps) * kStep<T>) {
      for (int i = 0; i < k; ++i) out[i] = rows[i] + begin;
      return;
    }
  }
  for (int i = 0; i < k; ++i) {
    Acc* copy = packed + static_cast<int64_t>(i) * kSubSteps * kStep<T>;
    pack(rows[i], begin, end, steps, copy);
    out[i] = copy;
  }
}

template <class T, int k>
inline void chunk_triangle(const T* const* rows, int64_t begin, int64_t end, double* out) {
  using V = typename Stored<T>::Vec;
  using Acc = typename V::Acc;
  constexpr int L = kStep<T>, P = k * (k + 1) / 2;
  alignas(64) Acc lanes[P * L] = {};
  alignas(64) Acc packed[k * kSubSteps * L];
  const Acc* at[k];
  int64_t s = begin;
  if constexpr (k == 1 && std::is_same<T, Acc>::value)
    for (; s + kAbreast * kSubSteps * L <= end; s += kAbreast * kSubSteps * L) square<V>(rows[0] + s, lanes);
  for (; s < end; s += kSubSteps * L) {
    const int64_t stop = end - s < kSubSteps * L ? end : s + kSubSteps * L;
    const int steps = static_cast<int>((stop - s + L - 1) / L);
    stretch_rows<T>(rows, k, s, stop, steps, packed, at);
    triangle<V, k>(at, steps, lanes);
  }
  for (int e = 0; e < P; ++e) out[e] += fold(lanes + e * L);
}

// Adds the Gramians of chunks [first, last) of k rows of n elements, in order; acc_of(chunk) says where to.
template <class T, class AccOf>
inline void gram_chunks(const T* const* rows, int k, int64_t n, int64_t first, int64_t last, const AccOf& acc_of) {
  if (k > kTriangle) return gram_panels(rows, k, n, first, last, acc_of);
  for (int64_t c = first; c < last; ++c) {
    double* out = acc_of(c);
    const int64_t begin = c * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
    switch (k) {
      case 1: chunk_triangle<T, 1>(rows, begin, end, out); break;
      case 2: chunk_triangle<T, 2>(rows, begin, end, out); break;
      case 3: chunk_triangle<T, 3>(rows, begin, end, out); break;
      case 4: chunk_triangle<T, 4>(rows, begin, end, out); break;
#if defined(__AVX512F__)
      case 5: chunk_triangle<T, 5>(rows, begin, end, out); break;
      case 6: chunk_triangle<T, 6>(rows, begin, end, out); break;
#endif
    }
  }
}

// Sums units 0..units-1 in the order of gramian.h; range(first, last, acc_of) adds those of unit u to acc_of(u), in order.
// `work` decides whether threads pay.
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
  if (work <= 32768 || slots <= 1 || pool.threads == 1) {
    double* slot = clear(arena.take<double>(pairs));
    range(0, units, [&](int64_t u) {
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
    range(begin * group, end * group < units ? end * group : units, [&](int64_t u) {
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
      [&](int64_t first, int64_t last, const auto& acc_of) {
        if (k > 0 && first < last) gram_chunks<T>(rows, k, n, first, last, acc_of);
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
