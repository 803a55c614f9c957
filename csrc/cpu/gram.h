// The Gramian of k rows of n numbers. Inside a chunk: per pair 16 float (8 double) lanes, chains of 32 fused multiply-adds, the chains
// of a chunk added lane by lane in order, the lanes met in a tree; across chunks: double, in order (gramian.h).
// No order here depends on register width, tile shape or thread, so all of these give the same bits.
#pragma once

#include <type_traits>

#include "../gramian.h"
#include "arena.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kPanel = 64;  // rows whose lane sums are kept at once: 64 x 64 pairs are 256 KB
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileCols = 4, kTriangle = 6;  // accumulators in registers: 24 of 32, and 21 of 32
#else
constexpr int kTileRows = 3, kTileCols = 3, kTriangle = 4;  // 9 of 16, and 10 of 16
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

// The pairs of R rows with C others; lanes of pair (i, j) stand at lanes[(i * C + j) * L].
template <class V, int R, int C>
inline void tile(const typename V::Acc* const* a, const typename V::Acc* const* b, int steps, typename V::Acc* lanes) {
  constexpr int L = V::width * V::parts;
  const typename V::Acc *pa[R], *pb[C];
  for (int i = 0; i < R; ++i) pa[i] = a[i];
  for (int j = 0; j < C; ++j) pb[j] = b[j];
  for (int part = 0; part < V::parts; ++part) {
    typename V::Reg acc[R][C];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[i][j] = V::zero();
    for (int64_t t = part * V::width; t < static_cast<int64_t>(steps) * L; t += L) {
      typename V::Reg x[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) x[i] = V::load(pa[i] + t);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) {
        const typename V::Reg y = V::load(pb[j] + t);

#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) acc[i][j] = V::fma(x[i], y, acc[i][j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) add_lanes<V>(lanes + (i * C + j) * L + part * V::width, acc[i][j]);
  }
}

template <class V, int R>
inline void tile_columns(int columns, const typename V::Acc* const* a, const typename V::Acc* const* b, int steps, typename V::Acc* lanes) {
  switch (columns) {
    case 1: return tile<V, R, 1>(a, b, steps, lanes);
    case 2: return tile<V, R, 2>(a, b, steps, lanes);
    case 3: return tile<V, R, 3>(a, b, steps, lanes);
#if defined(__AVX512F__)
    case 4: return tile<V, R, 4>(a, b, steps, lanes);
#endif
  }
}

// Calls f(i, r, j, c) for each tile of r rows from i on and c columns from j on; of one panel with itself only those that meet the upper triangle.
template <class F>
MMFAST_INLINE void tiles(int na, int nb, bool same, const F& f) {
  for (int i = 0; i < na; i += kTileRows)
    for (int j = same ? i : 0; j < nb; j += kTileCols) f(i, na - i < kTileRows ? na - i : kTileRows, j, nb - j < kTileCols ? nb - j : kTileCols);
}

// The pairs of two panels of at most kPanel rows. Lanes stand tile after tile, in the order in which they are used.
template <class V>
inline void panels(const typename V::Acc* const* a, int na, const typename V::Acc* const* b, int nb, bool same, int steps, int64_t ahead,
                   typename V::Acc* lanes) {
  constexpr int L = V::width * V::parts;
  // the next stretch of the rows is fetched a row every few tiles, while this one keeps the multipliers busy
  int count = 0;
  tiles(na, nb, same, [&](int, int, int, int) { ++count; });
  int next_row = 0, credit = 0;
  tiles(na, nb, same, [&](int i, int r, int j, int c) {
    for (credit += ahead ? na : 0; credit >= count && next_row < na; credit -= count) {  // na rows spread over count tiles
      const typename V::Acc* row = a[next_row++] + ahead;
      for (int t = 0; t < steps; ++t) __builtin_prefetch(row + t * L, 0, 2);
    }
    switch (r) {
      case 1: tile_columns<V, 1>(c, a + i, b + j, steps, lanes); break;
      case 2: tile_columns<V, 2>(c, a + i, b + j, steps, lanes); break;
      case 3: tile_columns<V, 3>(c, a + i, b + j, steps, lanes); break;
#if defined(__AVX512F__)
      case 4: tile_columns<V, 4>(c, a + i, b + j, steps, lanes); break;
      case 5: tile_columns<V, 5>(c, a + i, b + j, steps, lanes); break;
      case 6: tile_columns<V, 6>(c, a + i, b + j, steps, lanes); break;
#endif
    }
    lanes += r * c * L;
  });
}

// The lanes of one pair, met in a tree.
template <class Acc, int L>
MMFAST_INLINE double fold(const Acc* lanes) {
  Acc t[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) t[i] = lanes[i];
#pragma GCC unroll 4
  for (int stride = L / 2; stride > 0; stride /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < stride; ++i) t[i] += t[i + stride];
  return static_cast<double>(t[0]);
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
  for (int e = 0; e < P; ++e) out[e] += fold<Acc, L>(lanes + e * L);
}

template <class T>
inline void chunk_panels(const T* const* rows, int k, int64_t begin, int64_t end, double* out) {
  using V = typename Stored<T>::Vec;
  using Acc = typename V::Acc;
  constexpr int L = kStep<T>;
  Arena arena;
  const int side = k < kPanel ? k : kPanel;
  Acc* lanes = arena.take<Acc>(static_cast<int64_t>(side) * kPanel * L);
  Acc* packed = arena.take<Acc>(2 * static_cast<int64_t>(side) * kSubSteps * L);
  const Acc* at[2 * kPanel];
  for (int pa = 0; pa < k; pa += kPanel) {
    for (int pb = pa; pb < k; pb += kPanel) {
      const int na = k - pa < kPanel ? k - pa : kPanel, nb = k - pb < kPanel ? k - pb : kPanel;
      const bool same = pa == pb;
      std::memset(static_cast<void*>(lanes), 0, sizeof(Acc) * static_cast<size_t>(na) * kPanel * L);
      for (int64_t s = begin; s < end; s += kSubSteps * L) {
        const int64_t stop = end - s < kSubSteps * L ? end : s + kSubSteps * L;
        const int steps = static_cast<int>((stop - s + L - 1) / L);
        stretch_rows<T>(rows + pa, na, s, stop, steps, packed, at);
        if (!same) stretch_rows<T>(rows + pb, nb, s, stop, steps, packed + static_cast<int64_t>(side) * kSubSteps * L, at + kPanel);
        panels<V>(at, na, same ? at : at + kPanel, nb, same, steps, std::is_same<T, Acc>::value ? kSubSteps * L : 0, lanes);
      }
      const Acc* lane = lanes;
      tiles(na, nb, same, [&](int i, int r, int j, int c) {
        for (int row = i; row < i + r; ++row) {
          double* pairs = out + pair_index(k, pa + row, pb);
          for (int column = j; column < j + c; ++column, lane += L)
            if (!same || row <= column) pairs[column] += fold<Acc, L>(lane);
        }
      });
    }
  }
}

// Adds the Gramian of elements [begin, end) of k rows, one chunk at most, to the pairs out.
template <class T>
inline void gram_chunk(const T* const* rows, int k, int64_t begin, int64_t end, double* out) {
  switch (k) {
    case 1: return chunk_triangle<T, 1>(rows, begin, end, out);
    case 2: return chunk_triangle<T, 2>(rows, begin, end, out);
    case 3: return chunk_triangle<T, 3>(rows, begin, end, out);
    case 4: return chunk_triangle<T, 4>(rows, begin, end, out);
#if defined(__AVX512F__)
    case 5: return chunk_triangle<T, 5>(rows, begin, end, out);
    case 6: return chunk_triangle<T, 6>(rows, begin, end, out);
#endif
    default: return chunk_panels<T>(rows, k, begin, end, out);
  }
}

// Sums unit(u, pairs) over u in 0..units-1 in the order of gramian.h; unit adds to pairs. `work` decides whether threads pay.
template <class Unit>
inline void sum_units(const Pool& pool, int64_t units, int64_t work, int64_t pairs, const Unit& unit, double* total) {
  const int64_t group = group_size(units), slots = (units + group - 1) / group;
  Arena arena;
  for (int64_t e = 0; e < pairs; ++e) total[e] = 0.0;
  const bool serial = work <= 32768 || slots <= 1 || pool.threads == 1;
  double* slot = arena.take<double>(serial ? pairs : slots * pairs);
  auto sum_group = [&](int64_t s, double* acc) {
    for (int64_t e = 0; e < pairs; ++e) acc[e] = 0.0;
    for (int64_t u = s * group; u < units && u < (s + 1) * group; ++u) unit(u, acc);
  };
  auto add_group = [&](const double* acc) {
    for (int64_t e = 0; e < pairs; ++e) total[e] += acc[e];
  };
  if (serial) {
    for (int64_t s = 0; s < slots; ++s) {
      sum_group(s, slot);
      add_group(slot);
    }
    return;
  }
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) sum_group(s, slot + s * pairs);
  };
  using Range = decltype(range);
  pool.run(slots, 1, [](int64_t begin, int64_t end, void* ctx) { (*static_cast<Range*>(ctx))(begin, end); }, &range);
  for (int64_t s = 0; s < slots; ++s) add_group(slot + s * pairs);
}

// Serial: the pairs of k rows of n elements, in the same order as sum_units over chunks.
template <class T>
inline void gram_serial(const T* const* rows, int k, int64_t n, double* total) {
  const Pool none{1, nullptr};
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  sum_units(none, chunks, 0, pair_count(k),
            [&](int64_t c, double* acc) { gram_chunk<T>(rows, k, c * kChunk, (c + 1) * kChunk < n ? (c + 1) * kChunk : n, acc); }, total);
}

template <class T>
inline void gram_parallel(const Pool& pool, const T* const* rows, int k, int64_t n, double* total) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  sum_units(pool, chunks, n * k, pair_count(k),
            [&](int64_t c, double* acc) { gram_chunk<T>(rows, k, c * kChunk, (c + 1) * kChunk < n ? (c + 1) * kChunk : n, acc); }, total);
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
