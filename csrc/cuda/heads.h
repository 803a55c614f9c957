// The Gramian of linear branches on the GPU, as cpu/heads.h has it: products of all pairs of columns by blocks, the parts of the branches by threads.
// Sums have the order of the CPU where every chain of rows has a slot of its own.
#pragma once

#include "../cpu/kernels.h"
#include "../gramian.h"
#include "exec.h"
#include "numbers.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kChainRows = 128;  // cpu/columns.h: kChain
constexpr int kSquare = 32;      // columns each way that a block multiplies, and rows that it holds at once
constexpr int kSquarePairs = kSquare * kSquare / kThreads, kSquareRight = 4, kSquareLeft = kSquarePairs / kSquareRight;
constexpr int64_t kMostSquares = 4096;  // of all slots: enough blocks for any GPU

// A matrix of which the products of all pairs of columns are wanted.
struct Columns {
  Dtype dtype;
  const void* data;
  int64_t rows, columns, down, right;  // elements from one row to the next, from one column to the next
  MMFAST_HD int64_t tiles() const { return (columns + kSquare - 1) / kSquare; }
  MMFAST_HD int64_t squares() const { return tiles() * (tiles() + 1) / 2; }
  // Rows to a slot: whole chains, more of them only where slots would be many.
  MMFAST_HD int64_t slot_rows() const {
    int64_t size = kChainRows;
    while (size < rows && ((rows + size - 1) / size > kMaxSlots || (rows + size - 1) / size * squares() > kMostSquares)) size *= 2;
    return size;
  }
  MMFAST_HD int64_t slots() const { return rows ? (rows + slot_rows() - 1) / slot_rows() : 1; }
};

// Shared memory of a block: two squares, whose rows stand one apart so that columns are in different banks.
template <class T>
constexpr int square_shared() {
  return 2 * kSquare * (kSquare + 1);
}

// Products of columns first * kSquare.. with second * kSquare.. over the rows of a slot, to out[i * columns + j].
template <class T>
MMFAST_BLOCK inline void product_square(const Block& block, const Columns& x, int64_t slot, int64_t first, int64_t second, Acc<T>* shared, double* out) {
  constexpr int stride = kSquare + 1, across = kSquare / kSquareRight;
  Acc<T>*left = shared, *right = shared + kSquare * stride;
  const T* data = static_cast<const T*>(x.data);
  typename Block::template Per<Acc<T>[kSquarePairs]> sums;
  typename Block::template Per<double[kSquarePairs]> total;
  block.each([&](int t) {
    for (int e = 0; e < kSquarePairs; ++e) sums(t)[e] = 0, total(t)[e] = 0.0;
  });
  const int64_t size = x.slot_rows(), begin = slot * size, stop = begin + size < x.rows ? begin + size : x.rows;
  for (int64_t row = begin; row < stop; row += kSquare) {
    const int here = static_cast<int>(stop - row < kSquare ? stop - row : kSquare);
    block.sync();
    block.each([&](int t) {
      for (int e = t; e < kSquare * kSquare; e += kThreads) {
        // neighbours read neighbours
        const int r = x.right == 1 ? e / kSquare : e % kSquare, c = x.right == 1 ? e % kSquare : e / kSquare;
        const int64_t i = first * kSquare + c, j = second * kSquare + c;
        left[r * stride + c] = r < here && i < x.columns ? number(data + (row + r) * x.down + i * x.right) : Acc<T>(0);
        right[r * stride + c] = r < here && j < x.columns ? number(data + (row + r) * x.down + j * x.right) : Acc<T>(0);
      }
    });
    block.sync();
    block.each([&](int t) {
      const Acc<T>*at = left + t / across * kSquareLeft, *other = right + t % across;
      for (int r = 0; r < here; ++r)
#pragma unroll
        for (int i = 0; i < kSquareLeft; ++i)
#pragma unroll
          for (int j = 0; j < kSquareRight; ++j) {
            Acc<T>& sum = sums(t)[i * kSquareRight + j];
            sum = fused(at[r * stride + i], other[r * stride + j * across], sum);
          }
      if ((row + kSquare) % kChainRows && row + kSquare < stop) return;
#pragma unroll
      for (int e = 0; e < kSquarePairs; ++e) total(t)[e] += static_cast<double>(sums(t)[e]), sums(t)[e] = 0;
    });
  }
  block.each([&](int t) {
#pragma unroll
    for (int e = 0; e < kSquarePairs; ++e) {
      const int64_t i = first * kSquare + t / across * kSquareLeft + e / kSquareRight, j = second * kSquare + t % across + e % kSquareRight * across;
      if (i < x.columns && j < x.columns) out[i * x.columns + j] = total(t)[e];
    }
  });
}

// What the Gramian of K branches with `outputs` columns is folded from.
struct Branches {
  const int64_t* head_of;  // [outputs], ascending
  int64_t outputs;
  int K;
  Columns sent, weight;    // delta, of one sample where each has its problem, and W
  const double *deltas, *weights;  // slots of their products; `deltas` is null where they are formed from `sent`
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
MMFAST_HD inline double fold_products(const Columns& x, const double* slots, int64_t i, int64_t j) {
  const int64_t size = x.columns * x.columns, count = x.slots();
  double total = 0.0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int64_t s = 0; s < count; ++s) total += slots[s * size + i * x.columns + j];
  return total;
}

// The same from the matrix itself, for few rows.
template <class T>
MMFAST_BLOCK inline double multiply_columns(const Columns& x, const T* data, int64_t i, int64_t j) {
  double total = 0.0;
  for (int64_t row = 0; row < x.rows; row += kChainRows) {
    Acc<T> sum = 0;
    for (int64_t r = row; r < row + kChainRows && r < x.rows; ++r) sum = fused(number(data + r * x.down + i * x.right), number(data + r * x.down + j * x.right), sum);
    total += static_cast<double>(sum);
  }
  return total;
}

// What is kept of a problem on the way to its Gramian: sums over the outputs of a branch, [K, outputs], then of each output its product with itself, and
// whether it sends anything.
struct Parts {
  double* sums;
  int64_t outputs;
  int K;
  MMFAST_HD static int64_t size(int K, int64_t outputs) { return (K + 2) * outputs; }
  MMFAST_HD double& of(int64_t branch, int64_t j) const { return sums[branch * outputs + j]; }
  MMFAST_HD double& own(int64_t j) const { return sums[K * outputs + j]; }
  MMFAST_HD double& sends(int64_t j) const { return sums[(K + 1) * outputs + j]; }
};

// product(i, j) is that of columns of delta.
template <class Product>
MMFAST_BLOCK inline void put_parts(const Branches& h, const int* begin, Product product, int64_t thread, int64_t threads, const Parts& parts) {
  const int64_t O = h.outputs;
  for (int64_t e = thread; e < h.K * O; e += threads) {
    const int a = static_cast<int>(e / O);
    const int64_t j = e % O, end = begin[a + 1];
    if (j < begin[a]) continue;
    double sum = 0.0;
    for (int64_t i = begin[a]; i < end && i <= j; ++i) {
      const double d = product(i, j), part = d * fold_products(h.weight, h.weights, i, j);
      sum += j < end && i < j ? 2.0 * part : part;
      if (i == j) parts.own(j) = part, parts.sends(j) = d == 0.0 ? 0.0 : 1.0;
    }
    parts.of(a, j) = sum;
  }
}

MMFAST_HD inline bool sends(const int* begin, const Parts& parts, int a) {
  for (int64_t j = begin[a]; j < begin[a + 1]; ++j)
    if (parts.sends(j) != 0.0) return true;
  return false;
}

// G [K, K] of one problem from its parts. A branch that sends nothing has no products: its weights may be anything.
MMFAST_HD inline void put_gramian(const int* begin, double precision, const Parts& parts, int64_t thread, int64_t threads, double* G) {
  const int64_t K = parts.K;
  for (int64_t e = thread; e < K * K; e += threads) {
    const int a = static_cast<int>(e / K), b = static_cast<int>(e % K);
    if (b < a) continue;
    double product = 0.0, length = 0.0;
    if (sends(begin, parts, a) && sends(begin, parts, b)) {
      for (int64_t j = begin[b]; j < begin[b + 1]; ++j) product += parts.of(a, j);
      for (int64_t j = begin[a]; a == b && j < begin[a + 1]; ++j) length += sqrt(parts.own(j));
    }
    // where the parts of a branch's gradient cancel, rounding must make it neither missing nor negative
    const double lift = precision * length * length - product;
    G[e] = a == b && !(lift <= 0.0) ? product + lift : product;
    G[b * K + a] = G[e];
  }
}

// heads.cu. What a mask leaves of delta, in the type of the last product; and the slots of the products of `sent`, if asked for, then those of `weight`.
void send(const Heads& h, const int64_t* head_of, void* left, void* stream);
void multiply(const Columns& sent, const Columns& weight, bool of_sent, double* slots, void* stream);

}  // namespace MMFAST_ISA
}  // namespace mmfast
