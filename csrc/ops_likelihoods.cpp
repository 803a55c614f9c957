// Operators of the likelihoods on the CPU: their schemas and the checks that memory safety needs.
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "feature_table.h"
#include "torch_pool.h"

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();

// What a likelihood takes, in the order of Kind.
constexpr const char* kSupport[kKinds] = {"any number",         "a number from 0 on",  "a number from 0 on",  "a number from 0 on",
                                          "a number from 0 to 1", "the number of a class", "the number of a class", "a whole number from 0 on"};
constexpr const char* kNames[kKinds] = {"Normal", "LogNormal", "Gamma", "Exponential", "Bernoulli", "Categorical", "Ordinal", "Poisson"};

Dtype f32_or_f64(const char* op, const char* name, const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  STD_TORCH_CHECK(device_of(t) == cpu() && (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64()), op, ": ", name,
                  " must be a float32 or float64 tensor on the CPU");
  return dtype == aoti_torch_dtype_float64() ? Dtype::f64 : Dtype::f32;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The features of a call and its sizes; raw is [..., outputs].
std::vector<Feature> features_of(const char* op, LogProb& a, const Tensor& raw, const Tensor& table, const std::optional<Tensor>& w) {
  const auto sizes = raw.sizes(), t = table.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1 && device_of(table) == cpu() && dtype_of(table) == aoti_torch_dtype_int64() && t.size() == 2 && t[1] == 2 && table.is_contiguous(), op,
                  ": features must be a contiguous int64 tensor [K, 2], the outputs have a dimension at least");
  a.outputs = sizes[sizes.size() - 1];
  a.rows = a.outputs ? raw.numel() / a.outputs : 0;
  a.count = t[0];
  a.dtype = f32_or_f64(op, "raw", raw);
  std::vector<Feature> features;
  const int64_t* rows = static_cast<const int64_t*>(table.const_data_ptr());
  bool right;
  if (w) {
    const Dtype dtype = f32_or_f64(op, "w", *w);
    STD_TORCH_CHECK(w->is_contiguous() && w->numel() == a.count, op, ": w must be a contiguous tensor [K]");
    right = dtype == Dtype::f64 ? read_features(rows, static_cast<const double*>(w->const_data_ptr()), a.count, a.outputs, features)
                                : read_features(rows, static_cast<const float*>(w->const_data_ptr()), a.count, a.outputs, features);
  } else {
    right = read_features<double>(rows, nullptr, a.count, a.outputs, features);
  }
  STD_TORCH_CHECK(right, op, ": features must name kinds that exist, and all of the outputs");
  return features;
}

// (log-likelihoods [..., K], their derivatives [..., outputs], or [0] without them) of raw [..., outputs] and x [rows of x, K].
std::tuple<Tensor, Tensor> log_prob_cpu(Tensor raw, Tensor x, std::optional<Tensor> seen, Tensor table, Tensor w, bool with_slopes) {
  const char* op = "mmfast::log_prob";
  LogProb a{};
  const std::vector<Feature> features = features_of(op, a, raw, table, w);
  a.features = features.data();
  const Tensor outputs = dense(raw), values = dense(x), cells = seen ? dense(*seen) : values;
  a.raw = outputs.const_data_ptr();
  a.x = values.const_data_ptr();
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(f32_or_f64(op, "x", x) == a.dtype && sizes.size() == 2 && sizes[1] == a.count && (sizes[0] ? a.rows % sizes[0] == 0 : a.rows == 0), op,
                  ": x must be [B, K] of the dtype of raw, with B a divisor of the rows of raw");
  a.x_rows = sizes[0];
  if (seen) {
    const auto s = seen->sizes();
    a.seen_is_bool = dtype_of(*seen) == aoti_torch_dtype_bool();
    STD_TORCH_CHECK(device_of(*seen) == cpu() && (a.seen_is_bool || dtype_of(*seen) == dtype_of(raw)) && s.size() == 2 && s[0] == sizes[0] && s[1] == sizes[1], op,
                    ": seen must be a tensor of the shape of x, bool or of the dtype of raw");
    a.seen = cells.const_data_ptr();
  }
  std::vector<int64_t> shape(raw.sizes().begin(), raw.sizes().end());
  Tensor slopes = with_slopes ? empty(cpu(), shape.data(), static_cast<int64_t>(shape.size()), dtype_of(raw)) : empty(cpu(), {0}, dtype_of(raw));
  shape.back() = a.count;
  Tensor out = empty(cpu(), shape.data(), static_cast<int64_t>(shape.size()), dtype_of(raw));
  const int64_t wrong = kernels->log_prob(torch_pool(), a, out.mutable_data_ptr(), with_slopes ? slopes.mutable_data_ptr() : nullptr);
  if (wrong >= 0) {
    const Feature& f = features[wrong];
    const bool classes = f.kind == Kind::categorical || f.kind == Kind::ordinal;
    STD_TORCH_CHECK(false, op, ": x has a value in feature ", wrong, " that its likelihood, ", kNames[static_cast<int>(f.kind)], ", does not take, expected ",
                    kSupport[static_cast<int>(f.kind)], classes ? ", 0 to " : "", classes ? std::to_string(f.outputs - 1) : "");
  }
  return {out, slopes};
}

// The gradient [..., outputs] of raw from grad [..., K].
Tensor log_prob_backward_cpu(Tensor grad, Tensor slopes, Tensor table) {
  const char* op = "mmfast::log_prob_backward";
  LogProb a{};
  const std::vector<Feature> features = features_of(op, a, slopes, table, std::nullopt);
  a.features = features.data();
  const auto sizes = grad.sizes();
  STD_TORCH_CHECK(dtype_of(grad) == dtype_of(slopes) && device_of(grad) == cpu() && sizes.size() >= 1 && sizes[sizes.size() - 1] == a.count &&
                      grad.numel() == a.rows * a.count,
                  op, ": grad must be [..., K], of the type of slopes");
  GradOfLogProb back;
  Tensor from = grad;
  if (!rows_and_features(from.const_data_ptr(), sizes.data(), grad.strides().data(), static_cast<int64_t>(sizes.size()), back)) {
    from = torch::stable::contiguous(grad);
    back = {from.const_data_ptr(), a.count, 1};
  }
  const Tensor factors = dense(slopes);
  Tensor out = empty(cpu(), slopes.sizes().data(), static_cast<int64_t>(slopes.sizes().size()), dtype_of(slopes));
  kernels->log_prob_backward(torch_pool(), a, factors.const_data_ptr(), back, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mmfast, m) {
  m.def("log_prob(Tensor raw, Tensor x, Tensor? seen, Tensor features, Tensor w, bool slopes) -> (Tensor, Tensor)");
  m.def("log_prob_backward(Tensor grad, Tensor slopes, Tensor features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("log_prob", TORCH_BOX(&mmfast::log_prob_cpu));
  m.impl("log_prob_backward", TORCH_BOX(&mmfast::log_prob_backward_cpu));
}
