// The Gramian of linear branches on the GPU, as cpu/heads.h has it: products of all pairs of columns by blocks, the partial sums of the branches by
// threads. Sums have the order of the CPU where every chain of rows has a slot of its own.
#pragma once

#include "../gramian.h"
#include "../numbers.h"
#include "exec.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kProductTile = 32;  // columns each way that a block multiplies, and rows that it holds at once
constexpr int kThreadPairs = kProductTile * kProductTile / kThreads, kThreadRight = 4, kThreadLeft = kThreadPairs / kThreadRight;
constexpr int64_t kMaxProductBlocks = 4096;  // tiles of all slots: enough for any GPU

// A matrix of which the products of all pairs of columns are wanted; strides are elements from one row, or column, to the next.
struct MatrixView {
  Dtype dtype;
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
  MMFAST_HD int64_t tiles() const { return (columns + kProductTile - 1) / kProductTile; }
  MMFAST_HD int64_t tile_pairs() const { return tiles() * (tiles() + 1) / 2; }
  // Rows to a slot: whole chains, more of them only where slots would be many.
  MMFAST_HD int64_t slot_rows() const {
    int64_t size = kChainRows;
    while (size < rows && ((rows + size - 1) / size > kMaxSlots || (rows + size - 1) / size * tile_pairs() > kMaxProductBlocks)) size *= 2;
    return size;
  }
  MMFAST_HD int64_t slots() const { return rows ? (rows + slot_rows() - 1) / slot_rows() : 1; }
};

// Accumulators of a block in shared memory: two tiles, whose rows are one further apart than they are long so that columns are in different banks.
template <class T>
constexpr int product_shared_size() {
  return 2 * kProductTile * (kProductTile + 1);
}

// Products of columns first * kProductTile.. with second * kProductTile.. over the rows of a slot, to out[i * columns + j].
template <class T>
MMFAST_BLOCK inline void product_tile(const Block& block, const MatrixView& x, int64_t slot, int64_t first, int64_t second, Acc<T>* shared, double* out) {
  constexpr int stride = kProductTile + 1, threads_across = kProductTile / kThreadRight;
  Acc<T>*left = shared, *right = shared + kProductTile * stride;
  const T* data = static_cast<const T*>(x.data);
  typename Block::template PerThread<Acc<T>[kThreadPairs]> chain_sums;
  typename Block::template PerThread<double[kThreadPairs]> slot_sums;
  block.each_thread([&](int t) {
    for (int e = 0; e < kThreadPairs; ++e) chain_sums(t)[e] = 0, slot_sums(t)[e] = 0.0;
  });
  const int64_t size = x.slot_rows(), begin = slot * size, stop = begin + size < x.rows ? begin + size : x.rows;
  for (int64_t row = begin; row < stop; row += kProductTile) {
    const int tile_rows = static_cast<int>(stop - row < kProductTile ? stop - row : kProductTile);
    block.sync();
    block.each_thread([&](int t) {
      for (int e = t; e < kProductTile * kProductTile; e += kThreads) {
        // neighbours read neighbours
        const int r = x.column_stride == 1 ? e / kProductTile : e % kProductTile, c = x.column_stride == 1 ? e % kProductTile : e / kProductTile;
        const int64_t i = first * kProductTile + c, j = second * kProductTile + c;
        left[r * stride + c] = r < tile_rows && i < x.columns ? load_acc(data + (row + r) * x.row_stride + i * x.column_stride) : Acc<T>(0);
        right[r * stride + c] = r < tile_rows && j < x.columns ? load_acc(data + (row + r) * x.row_stride + j * x.column_stride) : Acc<T>(0);
      }
    });
    block.sync();
    block.each_thread([&](int t) {
      const Acc<T>*thread_left = left + t / threads_across * kThreadLeft, *thread_right = right + t % threads_across;
      for (int r = 0; r < tile_rows; ++r)
#pragma unroll
        for (int i = 0; i < kThreadLeft; ++i)
#pragma unroll
          for (int j = 0; j < kThreadRight; ++j) {
            Acc<T>& sum = chain_sums(t)[i * kThreadRight + j];
            sum = fma_rn(thread_left[r * stride + i], thread_right[r * stride + j * threads_across], sum);
          }
      if ((row + kProductTile) % kChainRows && row + kProductTile < stop) return;
#pragma unroll
      for (int e = 0; e < kThreadPairs; ++e) slot_sums(t)[e] += static_cast<double>(chain_sums(t)[e]), chain_sums(t)[e] = 0;
    });
  }
  block.each_thread([&](int t) {
#pragma unroll
    for (int e = 0; e < kThreadPairs; ++e) {
      const int64_t i = first * kProductTile + t / threads_across * kThreadLeft + e / kThreadRight;
      const int64_t j = second * kProductTile + t % threads_across + e % kThreadRight * threads_across;
      if (i < x.columns && j < x.columns) out[i * x.columns + j] = slot_sums(t)[e];
    }
  });
}

// What the Gramian of K branches with `outputs` columns is folded from.
struct Branches {
  const int64_t* head_of;  // [outputs], ascending
  int64_t outputs;
  int K;
  MatrixView delta, weight;  // delta, or its part or sum that one problem is about, and W
  const double *delta_products, *weight_products;  // slots of their products; the first is null where they are formed from `delta`
};

// Where each branch begins among the outputs; begin[K] is where the last one ends.
MMFAST_HD inline void find_branches(const Branches& h, int64_t thread, int64_t threads, int* begin) {
  for (int64_t a = thread; a <= h.K; a += threads) {
    int64_t low = 0, high = h.outputs;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (h.head_of[middle] < a) low = middle + 1;
      else high = middle;
    }
    begin[a] = static_cast<int>(low);
  }
}

// Entry (i, j) of the products of `x`, its slots in order.
MMFAST_HD inline double fold_products(const MatrixView& x, const double* slots, int64_t i, int64_t j) {
  const int64_t size = x.columns * x.columns, count = x.slots();
  double sum = 0.0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int64_t s = 0; s < count; ++s) sum += slots[s * size + i * x.columns + j];
  return sum;
}

// The same from the matrix itself, for few rows.
template <class T>
MMFAST_BLOCK inline double column_product(const MatrixView& x, const T* data, int64_t i, int64_t j) {
  double sum = 0.0;
  for (int64_t row = 0; row < x.rows; row += kChainRows) {
    Acc<T> chain_sum = 0;
    for (int64_t r = row; r < row + kChainRows && r < x.rows; ++r)
      chain_sum = fma_rn(load_acc(data + r * x.row_stride + i * x.column_stride), load_acc(data + r * x.row_stride + j * x.column_stride), chain_sum);
    sum += static_cast<double>(chain_sum);
  }
  return sum;
}

// The partial sums of a problem on the way to its Gramian: over the outputs of a branch, [K, outputs], then of each output its product with itself, and
// whether its delta has a non-zero.
struct BranchPartials {
  double* data;
  int64_t outputs;
  int K;
  MMFAST_HD static int64_t size(int K, int64_t outputs) { return (K + 2) * outputs; }
  MMFAST_HD double& sum(int64_t branch, int64_t j) const { return data[branch * outputs + j]; }
  MMFAST_HD double& square(int64_t j) const { return data[K * outputs + j]; }
  MMFAST_HD double& nonzero(int64_t j) const { return data[(K + 1) * outputs + j]; }
};

// product(i, j) is that of columns of delta.
template <class Product>
MMFAST_BLOCK inline void store_partials(const Branches& h, const int* begin, Product product, int64_t thread, int64_t threads, const BranchPartials& partials) {
  const int64_t O = h.outputs;
  for (int64_t e = thread; e < h.K * O; e += threads) {
    const int a = static_cast<int>(e / O);
    const int64_t j = e % O, end = begin[a + 1];
    if (j < begin[a]) continue;
    double sum = 0.0;
    for (int64_t i = begin[a]; i < end && i <= j; ++i) {
      const double d = product(i, j), term = d * fold_products(h.weight, h.weight_products, i, j);
      sum += j < end && i < j ? 2.0 * term : term;
      if (i == j) partials.square(j) = term, partials.nonzero(j) = d == 0.0 ? 0.0 : 1.0;
    }
    partials.sum(a, j) = sum;
  }
}

// Whether a branch has a delta at all.
MMFAST_HD inline bool is_nonzero(const int* begin, const BranchPartials& partials, int a) {
  for (int64_t j = begin[a]; j < begin[a + 1]; ++j)
    if (partials.nonzero(j) != 0.0) return true;
  return false;
}

// G [K, K] of one problem from its partial sums. A branch without delta has no products: its weights may be anything.
MMFAST_HD inline void store_gramian(const int* begin, double precision, const BranchPartials& partials, int64_t thread, int64_t threads, double* G) {
  const int64_t K = partials.K;
  for (int64_t e = thread; e < K * K; e += threads) {
    const int a = static_cast<int>(e / K), b = static_cast<int>(e % K);
    if (b < a) continue;
    double product = 0.0, length = 0.0;
    if (is_nonzero(begin, partials, a) && is_nonzero(begin, partials, b)) {
      for (int64_t j = begin[b]; j < begin[b + 1]; ++j) product += partials.sum(a, j);
      for (int64_t j = begin[a]; a == b && j < begin[a + 1]; ++j) length += sqrt(partials.square(j));
    }
    G[e] = a == b ? bounded_square(product, length, precision) : product;
    G[b * K + a] = G[e];
  }
}

// heads.cu. What a mask leaves of delta, as the last product takes it; and the slots of the products of `delta`, if asked for, then those of `weight`.
void mask_delta(const Heads& h, const int64_t* head_of, void* left, void* stream);
void multiply_columns(const MatrixView& delta, const MatrixView& weight, bool with_delta, double* slots, void* stream);

}  // namespace MMFAST_ISA
}  // namespace mmfast
