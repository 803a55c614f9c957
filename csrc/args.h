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
  const double* leaks;  // GradDrop: one for all rows, or one for each of K
  int n_leaks;
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

enum class Kind { normal, log_normal, gamma, exponential, bernoulli, categorical, ordinal, poisson };
constexpr int kKinds = 8;

// One feature's likelihood: which, and which of the outputs are its own.
struct Feature {
  Kind kind;
  int64_t first, outputs;
  double w;  // scale of the local step
};

// Log-likelihoods of features: outputs raw [rows, outputs] and values x [x_rows, features], contiguous; row r goes with row r % x_rows of x, and of seen.
struct LogProb {
  Dtype dtype;  // of raw, x and what is written: f32 or f64
  const void* raw;
  const void* x;
  const void* seen;  // [x_rows, features], or null: of a cell that was not seen, 0, nothing is read, and 0 written
  bool seen_is_bool;  // else of dtype
  const Feature* features;
  int64_t rows, x_rows, outputs, count;
};

// What comes back to log-likelihoods [rows, features]: a sum's gradient is one number for all of a row.
struct GradOfLogProb {
  const void* data;
  int64_t row_stride, feature_stride;
};

// False where a tensor [..., features] is no such thing without a copy.
inline bool rows_and_features(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, GradOfLogProb& grad) {
  grad = {data, 0, dim ? strides[dim - 1] : 0};
  int64_t inner = 1;  // rows within one step of the dimension
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (inner == 1) grad.row_stride = strides[i];
    if (strides[i] != grad.row_stride * inner) return false;
    inner *= sizes[i];
  }
  return true;
}

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
