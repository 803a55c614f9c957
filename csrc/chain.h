// A chain of rules as an operator's arguments describe it: its checks, its state, its random stream.
#pragma once

#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "gramian.h"
#include "torch_api.h"

namespace mmfast {

// Values of state per problem.
inline int64_t state_width(const char* op, const std::optional<Tensor>& state, Device device, int64_t problems) {
  if (!state) return 0;
  const auto sizes = state->sizes();
  STD_TORCH_CHECK(device_of(*state) == device && state->is_contiguous() && dtype_of(*state) == aoti_torch_dtype_float64() && sizes.size() >= 1 &&
                      state->numel() == problems * sizes[sizes.size() - 1],
                  op, ": state must be a contiguous float64 tensor [..., S], S values for each problem");
  return sizes[sizes.size() - 1];
}

// Where a random stream keeps its seed and counter.
inline int64_t* stream_of(const char* op, const Tensor& rng, Device device) {
  STD_TORCH_CHECK(device_of(rng) == device && dtype_of(rng) == aoti_torch_dtype_int64() && rng.numel() == 2 && rng.is_contiguous(), op,
                  ": rng must be an int64 tensor (seed, counter)");
  return static_cast<int64_t*>(rng.mutable_data_ptr());
}

inline void set_chain(const CpuKernels& kernels, SolveArgs& args, const char* op, const std::vector<int64_t>& steps,
                      const std::vector<double>& params, int64_t state_size) {
  STD_TORCH_CHECK(steps.size() % 2 == 0 && !steps.empty(), op, ": steps must be pairs of rule and number of parameters");
  int64_t total = 0;
  for (size_t s = 1; s < steps.size(); s += 2) total += steps[s];
  STD_TORCH_CHECK(total == static_cast<int64_t>(params.size()), op, ": params do not fit steps");
  args.steps = steps.data();
  args.n_steps = static_cast<int>(steps.size() / 2);
  args.params = params.data();
  STD_TORCH_CHECK(kernels.accepts(args), op, ": steps name an unknown rule, or params do not fit it");
  const int64_t needed = kernels.state_size(args);
  STD_TORCH_CHECK(needed == state_size, op, ": the rules keep ", needed, " values of state, got ", state_size);
}

// The solver writes weights [K] and Gramian [K, K] of each problem into info, and keeps its S numbers of state.
inline void bind_info(SolveArgs& args, Tensor& info, std::optional<Tensor>& state, int64_t S) {
  args.w = static_cast<double*>(info.mutable_data_ptr());
  args.G = args.w + args.K;
  args.w_stride = args.G_stride = args.K + args.K * args.K;
  args.state = S ? static_cast<double*>(state->mutable_data_ptr()) : nullptr;
  args.state_stride = S;
}

// weights(): what the Gramians and the mask say of the problems, of at most max_rows.
inline void bind_gramians(SolveArgs& args, const char* op, const Tensor& gram, const std::optional<Tensor>& mask, int max_rows) {
  const auto sizes = gram.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 2 && dim < 64 && sizes[dim - 1] == sizes[dim - 2] && sizes[dim - 1] >= 1 && sizes[dim - 1] <= max_rows &&
                      gram.is_contiguous() && dtype_of(gram) == aoti_torch_dtype_float64(),
                  op, ": gram must be a contiguous float64 tensor [..., K, K] with K from 1 to ", max_rows);
  const int64_t K = sizes[dim - 1], batch = gram.numel() / (K * K);
  STD_TORCH_CHECK(!mask || (device_of(*mask) == device_of(gram) && mask->is_contiguous() && dtype_of(*mask) == aoti_torch_dtype_bool() &&
                            (mask->numel() == K || mask->numel() == batch * K)),
                  op, ": mask must be a contiguous bool tensor [K] or [..., K]");
  args.batch = batch;
  args.K = static_cast<int>(K);
  args.G = static_cast<const double*>(gram.const_data_ptr());
  args.G_stride = K * K;
  args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  args.mask_stride = mask && mask->numel() == batch * K ? K : 0;
}

}  // namespace mmfast
