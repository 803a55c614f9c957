// The gradients of a call as the CPU kernels read them: the rows that a mask leaves in, and their sums over the batch.
#pragma once

#include "pool.h"
#include "vec.h"

namespace mmfast {
namespace MMFAST_ISA {

// Whether the mask takes gradient i out of a sample.
inline bool is_masked(const Grads& g, int64_t sample, int i) { return g.mask && !g.mask[sample * g.mask_stride + g.row_index[i]]; }

// The rows of a sample that its mask leaves in, from `offset` on (all samples share the mask when mask_stride is 0).
template <class T>
struct PresentRows {
  const T* rows[kMaxRows];
  int row_index[kMaxRows];
  int k = 0;
  PresentRows(const Grads& g, int64_t sample, int64_t offset) {
    for (int i = 0; i < g.k; ++i)
      if (!is_masked(g, sample, i)) {
        rows[k] = static_cast<const T*>(g.rows[i]) + offset;
        row_index[k++] = g.row_index[i];
      }
  }
};

// Sums over the batch, rows [k, inner]; double inside, so that a large batch loses nothing.
template <class T, class Out>
inline void batch_sums(const Pool& pool, const Grads& g, Out* sums) {
  constexpr int64_t kBlock = 512;
  const int64_t blocks = (g.inner + kBlock - 1) / kBlock;
  parallel_for(pool, g.k * blocks, g.k * g.batch * g.inner, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int i = static_cast<int>(item / blocks);
      const int64_t from = item % blocks * kBlock, count = g.inner - from < kBlock ? g.inner - from : kBlock;
      const T* row = static_cast<const T*>(g.rows[i]) + from;
      double sum[kBlock] = {};
      for (int64_t b = 0; b < g.batch; ++b) {
        if (is_masked(g, b, i)) continue;
        for (int64_t t = 0; t < count; ++t) sum[t] += load_acc(row + b * g.inner + t);
      }
      for (int64_t t = 0; t < count; ++t) sums[i * g.inner + from + t] = static_cast<Out>(sum[t]);
    }
  });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
