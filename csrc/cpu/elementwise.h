// Rules that decide element by element: GradDrop and TrimmedMean. One read of the rows, one write, 16 (8) elements at a time.
#pragma once

#include "../solvers/philox.h"
#include "resolve.h"

namespace mmfast {
namespace MMFAST_ISA {

// 32-bit words in 64-bit lanes, as the widening multiply of each instruction set takes them; the upper halves may hold anything.
#if defined(__AVX512F__)
struct Words {
  using Reg = __m512i;
  static constexpr int width = 8;
  static MMFAST_INLINE Reg load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static MMFAST_INLINE Reg set(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_epu32(a, b); }
  static MMFAST_INLINE Reg high(Reg a) { return _mm512_srli_epi64(a, 32); }
  static MMFAST_INLINE Reg xor3(Reg a, Reg b, Reg c) { return _mm512_xor_si512(_mm512_xor_si512(a, b), c); }
  static MMFAST_INLINE void store(uint64_t* p, Reg a) { _mm512_storeu_si512(p, a); }
};
#elif defined(__AVX2__)
struct Words {
  using Reg = __m256i;
  static constexpr int width = 4;
  static MMFAST_INLINE Reg load(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static MMFAST_INLINE Reg set(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_epu32(a, b); }
  static MMFAST_INLINE Reg high(Reg a) { return _mm256_srli_epi64(a, 32); }
  static MMFAST_INLINE Reg xor3(Reg a, Reg b, Reg c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static MMFAST_INLINE void store(uint64_t* p, Reg a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
};
#else
struct Words {
  using Reg = uint64_t;
  static constexpr int width = 1;
  static MMFAST_INLINE Reg load(const uint64_t* p) { return *p; }
  static MMFAST_INLINE Reg set(uint64_t x) { return x; }
  static MMFAST_INLINE Reg mul(Reg a, Reg b) { return (a & 0xffffffffull) * (b & 0xffffffffull); }
  static MMFAST_INLINE Reg high(Reg a) { return a >> 32; }
  static MMFAST_INLINE Reg xor3(Reg a, Reg b, Reg c) { return a ^ b ^ c; }
  static MMFAST_INLINE void store(uint64_t* p, Reg a) { *p = a; }
};
#endif

// Uniforms of the 64 elements from 64 * group on: element e takes word e / 16 of the Philox block with index 16 * group + e % 16 (philox.h).
// 23 bits each: with the half added they are exact in single precision, and stay inside the open interval (0, 1).
template <class A>
inline void uniforms(uint64_t seed, uint32_t counter, uint64_t group, A* u) {
  using W = Words;
  constexpr int interleave = 2;  // the rounds of one register wait for each other
  alignas(64) uint64_t index[16], out[4][16];
  for (int i = 0; i < 16; ++i) index[i] = group * 16 + static_cast<uint64_t>(i);
  for (int i = 0; i < 16; i += interleave * W::width) {
    W::Reg c[interleave][4];
    for (int n = 0; n < interleave; ++n) {
      c[n][0] = W::load(index + i + n * W::width);
      c[n][1] = W::high(c[n][0]);
      c[n][2] = W::set(0);
      c[n][3] = W::set(counter);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
      for (int n = 0; n < interleave; ++n) {
        const W::Reg p0 = W::mul(W::set(0xD2511F53ull), c[n][0]), p1 = W::mul(W::set(0xCD9E8D57ull), c[n][2]);
        c[n][0] = W::xor3(W::high(p1), c[n][1], W::set(k0));
        c[n][2] = W::xor3(W::high(p0), c[n][3], W::set(k1));
        c[n][1] = p1;
        c[n][3] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int n = 0; n < interleave; ++n)
      for (int word = 0; word < 4; ++word) W::store(out[word] + i + n * W::width, c[n][word]);
  }
  for (int word = 0; word < 4; ++word)
    for (int i = 0; i < 16; ++i)
      u[word * 16 + i] = (static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(out[word][i]) >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

// f(first element, count <= 64, rows) over all elements in groups of 64 that do not cross a sample with its own mask.
template <class T, class F>
inline void for_each_group(const Pool& pool, const Grads& g, const F& f) {
  const bool per_sample = g.mask && g.mask_stride;
  const int64_t samples = per_sample ? g.batch : 1, inner = per_sample ? g.inner : g.batch * g.inner;
  const int64_t pieces = (inner + 4095) / 4096;
  parallel_for(pool, samples * pieces, samples * inner * g.k, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / pieces, from = item % pieces * 4096, to = inner - from < 4096 ? inner : from + 4096;
      const PresentRows<T> present(g, b, 0);
      const int64_t first = b * inner + from, last = b * inner + to;
      for (int64_t t = first; t < last;) {
        const int64_t next = (t / 64 + 1) * 64 < last ? (t / 64 + 1) * 64 : last;
        f(t, static_cast<int>(next - t), present);
        t = next;
      }
    }
  });
}

inline void graddrop(const Pool& pool, const Grads& g, const ElementwiseArgs& a, void* out) {
  with_type(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    using V = Vec<T>;
    using A = Acc<T>;
    typedef A Lanes __attribute__((vector_size(V::width * sizeof(A))));  // a V::Reg that can be compared and divided
    constexpr int kInterleave = 4, kTile = kInterleave * V::width;  // one register alone would wait for its division
    const Lanes zero = {}, one = zero + 1;
    for_each_group<T>(pool, g, [&](int64_t first, int count, const PresentRows<T>& present) {
      alignas(64) A draw[128], result[64];
      uniforms(a.seed, a.counter, static_cast<uint64_t>(first / 64), draw);
      if (first % 64) std::memcpy(draw + 64, draw, 64 * sizeof(A));
      for (int t = 0; t < count; t += kTile) {
        auto load = [&](int i, Lanes* x) {
          const T* row = present.rows[i] + first + t;
          if (t + kTile <= count) {
#pragma GCC unroll 4
            for (int n = 0; n < kInterleave; ++n) {
              const typename V::Reg whole = V::load(row + n * V::width);
              std::memcpy(x + n, &whole, sizeof whole);
            }
          } else {
            A rest[kTile] = {};
            load_row(row, count - t, rest);
            for (int n = 0; n < kInterleave; ++n) std::memcpy(x + n, rest + n * V::width, sizeof *x);
          }
        };
        Lanes x[kInterleave], sum[kInterleave], abs_sum[kInterleave], kept_sum[kInterleave], positive[kInterleave], negative[kInterleave];
#pragma GCC unroll 4
        for (int n = 0; n < kInterleave; ++n) sum[n] = abs_sum[n] = kept_sum[n] = zero;
        for (int i = 0; i < present.k; ++i) {
          load(i, x);
#pragma GCC unroll 4
          for (int n = 0; n < kInterleave; ++n) {
            sum[n] += x[n];
            abs_sum[n] += x[n] > 0 ? x[n] : zero - x[n];
          }
        }
#pragma GCC unroll 4
        for (int n = 0; n < kInterleave; ++n) {  // the share of a positive and of a negative element that is let through without a leak
          const Lanes purity = A(0.5) * (A(1) + sum[n] / abs_sum[n]);
          Lanes u;
          std::memcpy(&u, draw + first % 64 + t + n * V::width, sizeof u);
          positive[n] = purity > u ? one : zero;
          negative[n] = purity < u ? one : zero;
        }
        for (int i = 0; i < present.k; ++i) {
          load(i, x);
          const Lanes leak = zero + static_cast<A>(a.leaks[a.n_leaks == 1 ? 0 : present.row_index[i]]);
#pragma GCC unroll 4
          for (int n = 0; n < kInterleave; ++n) {
            const Lanes share = x[n] > 0 ? positive[n] : negative[n];
            kept_sum[n] += (share > leak ? share : leak) * x[n];
          }
        }
#pragma GCC unroll 4
        for (int n = 0; n < kInterleave; ++n) {
          kept_sum[n] += A(0) * abs_sum[n];  // a non-finite element stays one
          std::memcpy(result + t + n * V::width, kept_sum + n, sizeof *kept_sum);
        }
      }
      store_row(result, count, static_cast<T*>(out) + first);
    });
  });
}

inline void trimmed_mean(const Pool& pool, const Grads& all, const ElementwiseArgs& a, void* out) {
  with_type(all.dtype, [&](auto tag) {
    using T = decltype(tag);
    using V = Vec<T>;
    using A = Acc<T>;
    Arena outer;
    double* nonzero = outer.take<double>(static_cast<int64_t>(all.K) * all.K);
    presence<T>(all, 0, all.batch, nonzero);
    Grads g = all;  // a row of zeros is a missing row
    const void* rows[kMaxRows];
    int row_index[kMaxRows];
    g.rows = rows;
    g.row_index = row_index;
    g.k = 0;
    for (int i = 0; i < all.k; ++i)
      if (nonzero[static_cast<int64_t>(all.row_index[i]) * (all.K + 1)] != 0.0) {
        rows[g.k] = all.rows[i];
        row_index[g.k++] = all.row_index[i];
      }
    for_each_group<T>(pool, g, [&](int64_t first, int count, const PresentRows<T>& present) {
      Arena arena;
      const int k = present.k;
      A* x = arena.take<A>(static_cast<int64_t>(k) * 64);
      T* to = static_cast<T*>(out) + first;
      if (k == 0) {
        for (int t = 0; t < count; ++t) store_acc(to + t, A(0));
        return;
      }
      for (int i = 0; i < k; ++i) {
        for (int t = count; t < 64; ++t) x[i * 64 + t] = 0;
        load_row(present.rows[i] + first, count, x + i * 64);
      }
      const int max_trim = (k - 1) / 2, trim = a.trim < max_trim ? a.trim : max_trim;
      const A scale = A(1) / static_cast<A>(k - 2 * trim);
      alignas(64) A mean[64];
      for (int t = 0; t < count; t += V::width) {
        A* column = x + t;
        typename V::Reg zero = V::zero();  // or NaN where an element is not finite
        for (int i = 0; i < k; ++i) zero = V::fma(V::zero(), V::load(column + i * 64), zero);
        // `trim` bubbles bring the smallest to the front, as many the largest to the end
        for (int r = 0; r < trim; ++r) {
          typename V::Reg least = V::load(column + (k - 1) * 64);
          for (int i = k - 2; i >= r; --i) {
            const typename V::Reg other = V::load(column + i * 64);
            V::store(column + (i + 1) * 64, V::max(least, other));
            least = V::min(least, other);
          }
          V::store(column + r * 64, least);
        }
        for (int r = 0; r < trim; ++r) {
          typename V::Reg most = V::load(column + trim * 64);
          for (int i = trim + 1; i < k - r; ++i) {
            const typename V::Reg other = V::load(column + i * 64);
            V::store(column + (i - 1) * 64, V::min(most, other));
            most = V::max(most, other);
          }
          V::store(column + (k - 1 - r) * 64, most);
        }
        typename V::Reg sum = zero;
        for (int i = trim; i < k - trim; ++i) sum = V::add(sum, V::load(column + i * 64));
        V::store(mean + t, V::mul(sum, V::set(scale)));
      }
      store_row(mean, count, to);
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
