// What the CPU kernels take, and the table through which ops.cpp reaches the instruction set chosen at run time.
// Nothing here names torch.
#pragma once

#include <cstdint>

namespace mmfast {

enum class Dtype { f16, bf16, f32, f64 };

// Runs body(begin, end, ctx) over disjoint ranges that cover 0..n-1, in torch's own thread pool.
struct Pool {
  int threads;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx);
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
};

enum class Per { batch, sample, batch_sum };

// k gradients of batch * inner contiguous elements each, at `places` among K; mask is [K] or [batch, K], or null.
struct Grads {
  Dtype dtype;
  const void* const* rows;
  int k;
  const int* places;
  int K;
  int64_t batch;  // the leading dimension; 1 for scalars
  int64_t inner;
  Per per;
  const bool* mask;
  int64_t mask_stride;  // K for a mask per sample, 0 for one mask
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

struct CpuKernels {
  const char* isa;
  bool (*accepts)(const SolveArgs&);        // whether its rules exist and its parameters suffice
  int64_t (*state_size)(const SolveArgs&);  // doubles that the chain of args keeps per problem
  void (*solve)(const Pool&, const SolveArgs&);
  // G is [K, K], or [batch, K, K] per sample.
  void (*gram)(const Pool&, const Grads&, double* G);
  // w is [K], or [batch, K] per sample.
  void (*combine)(const Pool&, const Grads&, const double* w, void* out);
  // The two above around solve: args.G and args.w point to where they are to be written; args.state is updated in place.
  // Without `with_gram` the rule does not look at G: only its diagonal is written, 1 where a row has a non-zero element.
  void (*resolve)(const Pool&, const Grads&, const SolveArgs& args, bool with_gram, void* out);
  void (*graddrop)(const Pool&, const Grads&, const ElementwiseArgs&, void* out);
  void (*trimmed_mean)(const Pool&, const Grads&, const ElementwiseArgs&, void* out);
  // Gramian and weights of the gradients at the branches' common input, as in resolve; the resolved one is left right. `right` is
  // [outputs, inputs]; `left` is [batch, rows, outputs], or null where delta itself will do: not per sample, no mask, not float16.
  // Both are of delta's type, float for float16.
  void (*heads)(const Pool&, const Heads&, const SolveArgs& args, void* left, void* right);
};

// What mmfast/_direct finds in _C.so, to which it is not linked.
struct CpuEntry {
  const CpuKernels* kernels;
  Pool (*pool)();
};

extern const CpuKernels kernels_avx512, kernels_avx2, kernels_portable;  // the first two exist on x86 only

// The tables this processor can run, widest first.
struct Available {
  const CpuKernels* tables[3];
  int n = 0;
};
Available available_kernels();
const CpuKernels* choose_kernels();  // the widest, or the one that MMFAST_CPU_ISA names

}  // namespace mmfast
