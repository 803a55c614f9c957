// What the kernels of every device take. Nothing here names torch.
#pragma once

#include <cfloat>
#include <cstdint>

namespace mmfast {

enum class Dtype { f16, bf16, f32, f64 };

// Relative rounding of a Gramian of such gradients.
inline double gram_precision(Dtype dtype) { return dtype == Dtype::f64 ? DBL_EPSILON : FLT_EPSILON; }

enum class Per { batch, sample, batch_sum };

// k gradients of batch * inner contiguous elements each; gradient i is row row_index[i] of K, ascending. mask is [K] or [batch, K], or null.
struct Grads {
  Dtype dtype;
  const void* const* rows;
  int k;
  const int* row_index;
  int K;
  int64_t batch;  // the leading dimension; 1 for scalars
  int64_t inner;
  Per per;
  const bool* mask;
  int64_t mask_stride;  // K for a mask per sample, 0 for one mask
};

// Gradients of several tensors, each a list: those of every tensor, one problem (per batch, without a mask) over all.
struct GradLists {
  const Grads* tensors;
  int64_t count;
  int K;
};

// K x K problems: G [batch, K, K] -> w [batch, K]; state [batch, S] is updated in place.
struct SolveArgs {
  int64_t batch;
  int K;
  const double* G;
  int64_t G_stride;      // from one problem to the next
  const bool* mask;      // [K] of each problem, or null
  int64_t mask_stride;   // 0 when all problems share one mask
  const int64_t* steps;  // (rule id, number of parameters) pairs
  int n_steps;
  const double* params;
  bool preserve_norm;
  double precision;      // relative rounding of the numbers in G
  double* state;         // or null
  int64_t state_stride;
  uint64_t seed;
  uint32_t counter;
  double* w;
  int64_t w_stride;
  double* norm;          // [batch, 3] out: what the weights of problems are still to be multiplied by (solvers/norm.h); null where w has it, as it can
  double* raw_w;         // [batch, K] out, beside norm: the weights without it
};

struct ElementwiseArgs {
  double leak;       // GradDrop
  uint64_t seed;
  uint32_t counter;
  int trim;          // TrimmedMean
};

// K linear branches: output gradients [batch, rows, outputs] and weights [outputs, inputs], contiguous and of one type; branch i has
// sizes[i] of the outputs.
struct Heads {
  Dtype dtype;
  const void* delta;
  const void* weight;
  int64_t batch;
  int64_t rows;
  int64_t outputs;
  int64_t inputs;
  const int64_t* sizes;
  int K;
  Per per;
  const bool* mask;  // as in Grads
  int64_t mask_stride;
};

// Counts the outputs of each branch into sizes [K], zeros before; false where head_of [outputs] does not name all of K branches in order.
inline bool branch_sizes(const int64_t* head_of, int64_t outputs, int64_t K, int64_t* sizes) {
  int64_t head = 0;
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t next = head_of[o];
    if (next < 0 || next >= K || !(next == head || (next == head + 1 && sizes[head]))) return false;
    ++sizes[head = next];
  }
  return head == K - 1 && sizes[head];
}

}  // namespace mmfast
