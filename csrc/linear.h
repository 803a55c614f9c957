// Linear branches as every device takes them: checked, contiguous, with room for what their operator returns.
#pragma once

#include "inputs.h"

namespace mmfast {

struct LinearInputs {
  Device device;
  Tensor delta, weight;
  std::optional<Tensor> mask;
  Heads heads{};      // without sizes
  SolveArgs args{};   // without a chain
  Tensor left, right; // the factors of the resolved gradient; left is delta itself where `copies` is false
  Tensor info;        // weights, then Gramian, of each problem
  bool copies, half;

  LinearInputs(const char* op, const Tensor& delta_in, const Tensor& weight_in, const Tensor& head_of, const std::optional<Tensor>& mask_in, int64_t K, int64_t per,
               bool preserve_norm)
      : device(device_of(delta_in)), delta(delta_in), weight(weight_in), left(delta_in), right(delta_in), info(delta_in) {
    const int64_t dim = delta.dim(), O = dim ? delta.size(dim - 1) : 0;
    STD_TORCH_CHECK(K >= 1 && K <= kMaxRows, op, ": k must be from 1 to 256");
    STD_TORCH_CHECK(per >= 0 && per <= 2, op, ": per must be 0, 1 or 2");
    STD_TORCH_CHECK(dim >= (per ? 2 : 1) && dim < 64 && weight.dim() == 2 && weight.size(0) == O, op,
                    ": delta must be [..., O], with a leading batch dimension for per = 1 and 2, and weight [O, H]");
    STD_TORCH_CHECK(device_of(weight) == device && dtype_of(delta) == dtype_of(weight), op, ": delta and weight must have one dtype and device");
    STD_TORCH_CHECK(device_of(head_of) == device && dtype_of(head_of) == aoti_torch_dtype_int64() && head_of.is_contiguous() && head_of.numel() == O, op,
                    ": head_of must be a contiguous int64 tensor [O]");
    STD_TORCH_CHECK(O >= K, op, ": head_of must name all of k branches in order");
    delta = torch::stable::contiguous(delta);
    weight = torch::stable::contiguous(weight);
    const Dtype dtype = dtype_or_throw(op, dtype_of(delta));
    half = dtype == Dtype::f16;
    const int64_t batch = dim > 1 ? delta.size(0) : 1, problems = per == 1 ? batch : 1, width = K + K * K, H = weight.size(1);
    heads = {dtype, delta.const_data_ptr(), weight.const_data_ptr(), batch, batch ? delta.numel() / (batch * O) : 0, O, H, nullptr, static_cast<int>(K), static_cast<Per>(per), nullptr, 0};
    args.batch = problems;
    args.K = heads.K;
    args.preserve_norm = preserve_norm;
    args.precision = gram_precision(dtype);
    if (mask_in) {
      mask = torch::stable::contiguous(*mask_in);
      const bool shared = mask->dim() == 1;
      STD_TORCH_CHECK(device_of(*mask) == device && dtype_of(*mask) == aoti_torch_dtype_bool() &&
                          (shared ? mask->numel() == K : mask->dim() == 2 && dim > 1 && mask->size(0) == batch && mask->size(1) == K),
                      op, ": mask must be a bool tensor [K] or [B, K]");
      heads.mask = static_cast<const bool*>(mask->const_data_ptr());
      heads.mask_stride = shared ? 0 : K;
    }
    const int32_t product = half ? aoti_torch_dtype_float32() : dtype_of(delta);
    copies = per == 1 || mask || half;
    left = copies ? empty(device, delta.sizes().data(), dim, product) : delta;
    right = empty(device, {O, H}, product);
    info = per == 1 ? empty(device, {problems, width}, aoti_torch_dtype_float64()) : empty(device, {width}, aoti_torch_dtype_float64());
  }

  void* left_out() const { return copies ? left.mutable_data_ptr() : nullptr; }

  // (resolved gradient [..., H], info) once the factors are written.
  std::tuple<Tensor, Tensor> results() const {
    Tensor out = torch::stable::matmul(left, right);
    return {half ? torch::stable::to(out, ScalarType::Half) : out, info};
  }
};

}  // namespace mmfast
