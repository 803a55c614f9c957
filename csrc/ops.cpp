// Operator schemas, the checks that memory safety needs, and the CPU registration. Messages for people come from Python.
#include <cstring>

#include "cpu/kernels.h"
#include "torch_api.h"

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();

Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, ctx); });
          }};
}

// [..., K, K] float64 -> ([..., K] float64, next state)
std::tuple<Tensor, Tensor> weights_cpu(Tensor gram, std::optional<Tensor> mask, std::vector<int64_t> steps, std::vector<double> params,
                                       std::optional<Tensor> state, std::optional<Tensor> rng, bool preserve_norm) {
  const auto sizes = gram.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 2 && sizes[dim - 1] == sizes[dim - 2] && gram.is_contiguous() && gram.scalar_type() == ScalarType::Double,
                  "mmfast::weights: gram must be a contiguous float64 tensor [..., K, K]");
  const int64_t K = sizes[dim - 1];
  const int64_t batch = K ? gram.numel() / (K * K) : 0;
  STD_TORCH_CHECK(K >= 1 && K <= 256, "mmfast::weights: K must be from 1 to 256");
  STD_TORCH_CHECK(!mask || (mask->is_contiguous() && mask->scalar_type() == ScalarType::Bool && (mask->numel() == K || mask->numel() == batch * K)),
                  "mmfast::weights: mask must be a contiguous bool tensor [K] or [..., K]");
  Tensor w = empty_cpu(sizes.data(), dim - 1, aoti_torch_dtype_float64());
  Tensor next = empty_cpu({0}, aoti_torch_dtype_float64());
  SolveArgs args{};
  args.batch = batch;
  args.K = static_cast<int>(K);
  args.G = static_cast<const double*>(gram.const_data_ptr());
  args.G_stride = K * K;
  args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  args.mask_stride = mask && mask->numel() == batch * K ? K : 0;
  args.steps = steps.data();
  args.n_steps = static_cast<int>(steps.size() / 2);
  args.params = params.data();
  args.preserve_norm = preserve_norm;
  if (state) {
    STD_TORCH_CHECK(state->is_contiguous() && state->scalar_type() == ScalarType::Double && batch && state->numel() % batch == 0,
                    "mmfast::weights: state must be a contiguous float64 tensor [..., S]");
    next = empty_cpu(state->sizes().data(), static_cast<int64_t>(state->sizes().size()), aoti_torch_dtype_float64());
    std::memcpy(next.mutable_data_ptr(), state->const_data_ptr(), state->numel() * sizeof(double));
    args.state = static_cast<double*>(next.mutable_data_ptr());
    args.state_stride = state->numel() / batch;
  }
  if (rng) {
    const int64_t* r = static_cast<const int64_t*>(rng->const_data_ptr());
    args.seed = static_cast<uint64_t>(r[0]);
    args.counter = static_cast<uint32_t>(r[1]);
  }
  args.w = static_cast<double*>(w.mutable_data_ptr());
  args.w_stride = K;
  if (batch) kernels->solve(torch_pool(), args);
  return {w, next};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY(mmfast, m) {
  m.def("weights(Tensor gram, Tensor? mask, int[] steps, float[] params, Tensor? state, Tensor? rng, bool preserve_norm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { m.impl("weights", TORCH_BOX(&mmfast::weights_cpu)); }
