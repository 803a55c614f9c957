// The gradients of one call, as every device takes them: checked, contiguous, with their row among K.
#pragma once

#include <algorithm>
#include <vector>

#include "args.h"
#include "gramian.h"
#include "torch_api.h"

namespace mmfast {

inline Dtype dtype_or_throw(const char* op, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::f16;
  STD_TORCH_CHECK(false, op, ": grads must be float16, bfloat16, float32 or float64");
}

class Inputs {
 public:
  Inputs(const char* op, const Tensors& grads, const std::vector<int64_t>& missing, const std::optional<Tensor>& mask, int64_t per) {
    const int64_t k = static_cast<int64_t>(grads.size()), K = k + static_cast<int64_t>(missing.size());
    STD_TORCH_CHECK(k >= 1 && K <= kMaxRows, op, ": from 1 to 256 gradients are needed");
    STD_TORCH_CHECK(per >= 0 && per <= 2, op, ": per must be 0, 1 or 2");
    first_ = &grads[0];
    device_ = device_of(*first_);
    const auto sizes = first_->sizes();
    const int32_t dtype = dtype_of(*first_);
    copies_.reserve(k);
    for (int64_t i = 0; i < k; ++i) {
      const Tensor& g = grads[i];
      const auto s = g.sizes();
      STD_TORCH_CHECK(device_of(g) == device_ && dtype_of(g) == dtype && s.size() == sizes.size() && std::equal(s.begin(), s.end(), sizes.begin()), op,
                      ": all gradients must have one shape, dtype and device");
      if (g.is_contiguous()) {
        rows_[i] = g.const_data_ptr();
      } else {
        copies_.push_back(torch::stable::contiguous(g));
        rows_[i] = copies_.back().const_data_ptr();
      }
    }
    size_t next = 0;
    for (int64_t row = 0, i = 0; row < K; ++row) {
      if (next < missing.size() && missing[next] == row) {
        ++next;
      } else {
        STD_TORCH_CHECK(i < k, op, ": missing must be ascending places below K");
        row_index_[i++] = static_cast<int>(row);
      }
    }
    STD_TORCH_CHECK(next == missing.size(), op, ": missing must be ascending places below K");
    grads_.dtype = dtype_or_throw(op, dtype);
    grads_.rows = rows_;
    grads_.k = static_cast<int>(k);
    grads_.row_index = row_index_;
    grads_.K = static_cast<int>(K);
    STD_TORCH_CHECK(per == 0 || sizes.size() >= 1, op, ": per sample needs a leading batch dimension");
    const int64_t numel = first_->numel();
    grads_.batch = sizes.size() ? sizes[0] : 1;
    grads_.inner = grads_.batch ? numel / grads_.batch : 0;
    grads_.per = static_cast<Per>(per);
    grads_.mask = nullptr;
    grads_.mask_stride = 0;
    if (mask) {
      mask_ = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
      const auto m = mask->sizes();
      const bool per_sample = m.size() == 2;
      STD_TORCH_CHECK(device_of(*mask) == device_ && dtype_of(*mask) == aoti_torch_dtype_bool() && (m.size() == 1 || per_sample) && m[m.size() - 1] == K &&
                          (!per_sample || (sizes.size() && m[0] == sizes[0])),
                      op, ": mask must be a bool tensor [K] or [B, K]");
      grads_.mask = static_cast<const bool*>(mask_->const_data_ptr());
      grads_.mask_stride = per_sample ? K : 0;
    }
  }
  const Grads& grads() const { return grads_; }
  const Tensor& first() const { return *first_; }
  // Problems to solve: one, or one per sample.
  int64_t problems() const { return grads_.per == Per::sample ? grads_.batch : 1; }
  // One float64 tensor of these sizes per problem: [B, sizes] per sample.
  Tensor per_problem(std::initializer_list<int64_t> sizes) const {
    std::vector<int64_t> all(sizes);
    if (grads_.per == Per::sample) all.insert(all.begin(), problems());
    return empty(device_, all.data(), static_cast<int64_t>(all.size()), aoti_torch_dtype_float64());
  }
  // The weights that combine() is given.
  const double* weights_or_throw(const char* op, const Tensor& w) const {
    STD_TORCH_CHECK(device_of(w) == device_ && w.is_contiguous() && dtype_of(w) == aoti_torch_dtype_float64() && w.numel() == problems() * grads_.K, op,
                    ": w must be a contiguous float64 tensor [K], or [B, K] per sample");
    return static_cast<const double*>(w.const_data_ptr());
  }
  Tensor like_one() const { return empty(device_, first_->sizes().data(), static_cast<int64_t>(first_->sizes().size()), dtype_of(*first_)); }

 private:
  Grads grads_{};
  const Tensor* first_;
  Device device_;
  Tensors copies_;  // of those that were not contiguous
  std::optional<Tensor> mask_;
  const void* rows_[kMaxRows];
  int row_index_[kMaxRows];
};

}  // namespace mmfast
