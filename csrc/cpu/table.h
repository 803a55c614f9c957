// The kernels of one instruction set; each isa_*.cpp compiles this file with its own flags and namespace.
#include "elementwise.h"
#include "heads.h"
#include "likelihoods.h"
#include "lists.h"
#include "resolve.h"

#define MMFAST_TABLE_(isa) kernels_##isa
#define MMFAST_TABLE(isa) MMFAST_TABLE_(isa)
#define MMFAST_NAME_(isa) #isa
#define MMFAST_NAME(isa) MMFAST_NAME_(isa)

namespace mmfast {
const CpuKernels MMFAST_TABLE(MMFAST_ISA) = {MMFAST_NAME(MMFAST_ISA), MMFAST_ISA::accepts, MMFAST_ISA::state_size, MMFAST_ISA::solve_batch, MMFAST_ISA::gram, MMFAST_ISA::combine, MMFAST_ISA::lengths, MMFAST_ISA::resolve,
                                           MMFAST_ISA::graddrop, MMFAST_ISA::trimmed_mean, MMFAST_ISA::heads, MMFAST_ISA::gram_lists, MMFAST_ISA::combine_lists, MMFAST_ISA::log_prob, MMFAST_ISA::log_prob_backward};
}
