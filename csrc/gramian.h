// Where a pair stands, and how N elements are cut: a function of N alone, never of threads or path.
#pragma once

#include <cstdint>

#ifndef MMFAST_HD
#ifdef __CUDACC__
#define MMFAST_HD __host__ __device__
#else
#define MMFAST_HD
#endif
#endif

namespace mmfast {

constexpr int64_t kChunk = 4096;   // elements whose products meet in single precision
constexpr int kSubSteps = 32;      // steps of one chain of fused multiply-adds inside a chunk
constexpr int64_t kMaxSlots = 512; // partial Gramians kept at once
constexpr int kMaxRows = 256;

// Pairs (i, j), i <= j, row by row of the upper triangle.
MMFAST_HD inline int64_t pair_count(int64_t k) { return k * (k + 1) / 2; }
MMFAST_HD inline int64_t pair_index(int64_t k, int64_t i, int64_t j) { return i * k - i * (i - 1) / 2 + (j - i); }

// Units (chunks or samples) are summed in order inside a group, groups in order after that.
MMFAST_HD inline int64_t group_size(int64_t units) {
  int64_t size = 1;
  while ((units + size - 1) / size > kMaxSlots) size *= 2;
  return size;
}

}  // namespace mmfast
