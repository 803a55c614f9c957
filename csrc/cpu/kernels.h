// The table through which ops.cpp reaches the CPU kernels of the instruction set chosen at run time.
#pragma once

#include "../args.h"

namespace mmfast {

// Runs body(begin, end, ctx) over disjoint ranges that cover 0..n-1, in torch's own thread pool.
struct Pool {
  int threads;
  void (*run)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx);
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
  // Squared lengths of the plain sum, the product of both, and of the weighted sum: total is [3], or [batch, 3] per sample.
  void (*lengths)(const Pool&, const Grads&, const double* w, double* total);
  // The two above around solve: args.G and args.w point to where they are to be written; args.state is updated in place.
  // Without `with_gram` the rule does not look at G: only its diagonal is written, 1 where a row has a non-zero element.
  void (*resolve)(const Pool&, const Grads&, const SolveArgs& args, bool with_gram, void* out);
  void (*graddrop)(const Pool&, const Grads&, const ElementwiseArgs&, void* out);
  void (*trimmed_mean)(const Pool&, const Grads&, const ElementwiseArgs&, void* out);
  // Gramian and weights of the gradients at the branches' common input, as in resolve; the resolved one is left right. `right` is
  // [outputs, inputs]; `left` is [batch, rows, outputs], or null where delta itself will do: not per sample, no mask, not float16.
  // Both are of delta's type, float for float16.
  void (*heads)(const Pool&, const Heads&, const SolveArgs& args, void* left, void* right);
  // G is [K, K], out[t] the weighted sum of tensor t.
  void (*gram_lists)(const Pool&, const GradLists&, double* G);
  void (*combine_lists)(const Pool&, const GradLists&, const double* w, void* const* out);
  // Log-likelihoods [rows, features] and, where slopes is not null, their derivatives [rows, outputs], each by its own feature. Returns -1, or the feature
  // of a class that does not exist; then what was written is of no use.
  int64_t (*log_prob)(const Pool&, const LogProb&, void* out, void* slopes);
  // The derivatives times what comes back to their features.
  void (*log_prob_backward)(const Pool&, const LogProb&, const void* slopes, const GradOfLogProb& grad, void* out);
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
