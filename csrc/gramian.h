// Where a pair stands, and how N elements are cut: a function of N alone, never of threads or path.
#pragma once

#include <cstdint>

#include "isa.h"

// What is here is always inlined: of instruction sets that share one namespace, none may link the code of another.
namespace mmfast {

constexpr int64_t kChunk = 4096;   // elements whose products meet in single precision
constexpr int kSubSteps = 32;      // steps of one chain of fused multiply-adds inside a chunk
constexpr int kChainRows = 128;    // rows of one chain in a product of two columns (linear branches)
constexpr int64_t kMaxSlots = 512; // partial Gramians kept at once
constexpr int kMaxRows = 256;
constexpr int kMaxSolved = 4096;   // rows of a Gramian that a processor solves; more than a kernel makes in one call

// Pairs (i, j), i <= j, row by row of the upper triangle.
MMFAST_HD MMFAST_INLINE int64_t pair_count(int64_t k) { return k * (k + 1) / 2; }
MMFAST_HD MMFAST_INLINE int64_t pair_index(int64_t k, int64_t i, int64_t j) { return i * k - i * (i - 1) / 2 + (j - i); }

// Units (chunks or samples) are summed in order inside a group, groups in order after that.
MMFAST_HD MMFAST_INLINE int64_t group_size(int64_t units) {
  int64_t size = 1;
  while ((units + size - 1) / size > kMaxSlots) size *= 2;
  return size;
}

// The squared norm of a linear branch's gradient, whose summands have `length` in sum: where they cancel, rounding must make it neither missing nor
// negative.
MMFAST_HD MMFAST_INLINE double bounded_square(double square, double length, double precision) {
  const double lift = precision * length * length - square;
  return !(lift <= 0.0) ? square + lift : square;
}

}  // namespace mmfast
