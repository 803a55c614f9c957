// Rules that decide element by element: GradDrop and TrimmedMean. One read of the rows, one write, 16 (8) elements at a time.
#pragma once

#include "../solvers/philox.h"
#include "resolve.h"

namespace mmfast {
namespace MMFAST_ISA {

// Uniforms of the 64 elements from 64 * group on: element e takes word e / 16 of the Philox block at place e % 16.
// 24 bits each, in the open interval (0, 1).
inline void uniforms(uint64_t seed, uint32_t counter, uint64_t group, float* u) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int i = 0; i < 16; ++i) {
    const uint64_t place = group * 16 + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(place);
    c1[i] = static_cast<uint32_t>(place >> 32);
    c2[i] = 0;
    c3[i] = counter;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      const uint64_t p0 = 0xD2511F53ull * c0[i], p1 = 0xCD9E8D57ull * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 16; ++i) {
    u[i] = (static_cast<float>(c0[i] >> 8) + 0.5f) * 5.9604644775390625e-8f;
    u[16 + i] = (static_cast<float>(c1[i] >> 8) + 0.5f) * 5.9604644775390625e-8f;
    u[32 + i] = (static_cast<float>(c2[i] >> 8) + 0.5f) * 5.9604644775390625e-8f;
    u[48 + i] = (static_cast<float>(c3[i] >> 8) + 0.5f) * 5.9604644775390625e-8f;
  }
}

// f(first element, count <= 64, rows, k) over all elements in groups of 64 that do not cross a sample with its own mask.
template <class T, class F>
inline void groups(const Pool& pool, const Grads& g, const F& f) {
  const bool apart = g.mask && g.mask_stride;
  const int64_t samples = apart ? g.batch : 1, inner = apart ? g.inner : g.batch * g.inner;
  const int64_t pieces = (inner + 4095) / 4096;
  run(pool, samples * pieces, samples * inner * g.k, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / pieces, from = item % pieces * 4096, to = inner - from < 4096 ? inner : from + 4096;
      const Present<T> p(g, b, 0);
      const int64_t first = b * inner + from, last = b * inner + to;
      for (int64_t t = first; t < last;) {
        const int64_t next = (t / 64 + 1) * 64 < last ? (t / 64 + 1) * 64 : last;
        f(t, static_cast<int>(next - t), p);
        t = next;
      }
    }
  });
}

template <class T>
inline void load_some(const T* row, int count, typename Stored<T>::Vec::Acc* x) {
  using V = typename Stored<T>::Vec;
  int t = 0;
  for (; t + V::width <= count; t += V::width) V::store(x + t, V::load(row + t));
  for (; t < count; ++t) read(row + t, x + t);
}

inline void graddrop(const Pool& pool, const Grads& g, const ElementwiseArgs& a, void* out) {
  with_type(g.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Stored<T>::Vec::Acc;
    const Acc leak = static_cast<Acc>(a.leak);
    groups<T>(pool, g, [&](int64_t first, int count, const Present<T>& p) {
      alignas(64) Acc x[64], sum[64], size[64], keep[64], positive[64], negative[64];
      alignas(64) float u[64];
      for (int t = 0; t < 64; ++t) x[t] = sum[t] = size[t] = keep[t] = 0;
      for (int i = 0; i < p.k; ++i) {
        load_some(p.rows[i] + first, count, x);
        for (int t = 0; t < 64; ++t) {
          sum[t] = sum[t] + x[t];
          size[t] = size[t] + std::fabs(x[t]);
        }
      }
      uniforms(a.seed, a.counter, static_cast<uint64_t>(first / 64), u);
      const int shift = static_cast<int>(first % 64);
      for (int t = 0; t < 64; ++t) {  // the share of a positive and of a negative element that is let through
        const Acc purity = Acc(0.5) * (Acc(1) + sum[t] / size[t]), draw = u[(t + shift) & 63];
        positive[t] = purity > draw ? Acc(1) : leak;
        negative[t] = purity < draw ? Acc(1) : leak;
      }
      for (int i = 0; i < p.k; ++i) {
        load_some(p.rows[i] + first, count, x);
        for (int t = 0; t < 64; ++t) keep[t] = keep[t] + (x[t] > 0 ? positive[t] : negative[t]) * x[t];
      }
      T* to = static_cast<T*>(out) + first;
      for (int t = 0; t < count; ++t) write(to + t, keep[t] + Acc(0) * size[t]);  // a non-finite element stays one
    });
  });
}

inline void trimmed_mean(const Pool& pool, const Grads& all, const ElementwiseArgs& a, void* out) {
  with_type(all.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = typename Stored<T>::Vec;
    using Acc = typename V::Acc;
    Arena outer;
    double* present = outer.take<double>(static_cast<int64_t>(all.K) * all.K);
    presence<T>(all, 0, all.batch, present);
    Grads g = all;  // a row of zeros is a missing row
    const void* rows[kMaxRows];
    int places[kMaxRows];
    g.rows = rows;
    g.places = places;
    g.k = 0;
    for (int i = 0; i < all.k; ++i)
      if (present[static_cast<int64_t>(all.places[i]) * (all.K + 1)] != 0.0) {
        rows[g.k] = all.rows[i];
        places[g.k++] = all.places[i];
      }
    groups<T>(pool, g, [&](int64_t first, int count, const Present<T>& p) {
      Arena arena;
      Acc* x = arena.take<Acc>(static_cast<int64_t>(p.k) * 64);
      T* to = static_cast<T*>(out) + first;
      if (p.k == 0) {
        for (int t = 0; t < count; ++t) write(to + t, Acc(0));
        return;
      }
      for (int i = 0; i < p.k; ++i) {
        for (int t = count; t < 64; ++t) x[i * 64 + t] = 0;
        load_some(p.rows[i] + first, count, x + i * 64);
      }
      const int trim = a.trim < (p.k - 1) / 2 ? a.trim : (p.k - 1) / 2, kept = p.k - 2 * trim;
      const Acc scale = Acc(1) / static_cast<Acc>(kept);
      alignas(64) Acc mean[64];
      for (int t = 0; t < count; t += V::width) {
        Acc* column = x + t;
        typename V::Reg finite = V::zero();
        for (int i = 0; i < p.k; ++i) finite = V::fma(V::zero(), V::load(column + i * 64), finite);
        // `trim` bubbles bring the smallest to the front, as many the largest to the end
        for (int r = 0; r < trim; ++r) {
          typename V::Reg least = V::load(column + (p.k - 1) * 64);
          for (int i = p.k - 2; i >= r; --i) {
            const typename V::Reg other = V::load(column + i * 64);
            V::store(column + (i + 1) * 64, V::max(least, other));
            least = V::min(least, other);
          }
          V::store(column + r * 64, least);
        }
        for (int r = 0; r < trim; ++r) {
          typename V::Reg most = V::load(column + trim * 64);
          for (int i = trim + 1; i < p.k - r; ++i) {
            const typename V::Reg other = V::load(column + i * 64);
            V::store(column + (i - 1) * 64, V::min(most, other));
            most = V::max(most, other);
          }
          V::store(column + (p.k - 1 - r) * 64, most);
        }
        typename V::Reg sum = finite;
        for (int i = trim; i < p.k - trim; ++i) sum = V::add(sum, V::load(column + i * 64));
        V::store(mean + t, V::mul(sum, V::set(scale)));
      }
      for (int t = 0; t < count; ++t) write(to + t, mean[t]);
    });
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
