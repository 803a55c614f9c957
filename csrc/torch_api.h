// The only header that names torch: the stable ABI of torch 2.10, so that one binary serves every later torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace mmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& t) {
  Device device{0, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  if (device.type != aoti_torch_device_type_cpu()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

inline Device cpu() { return {aoti_torch_device_type_cpu(), 0}; }

// A contiguous tensor with unwritten contents.
inline Tensor empty(Device device, const int64_t* sizes, int64_t dim, int32_t dtype) {
  int64_t strides[64];
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle));
  Tensor fresh(handle);
  // for tests: all bits set are NaN in every floating type, so that an element that nobody writes shows
  static const bool poison = std::getenv("MMFAST_POISON") != nullptr;
  if (poison && device == cpu() && fresh.numel())
    std::memset(fresh.mutable_data_ptr(), 0xff, static_cast<size_t>(fresh.numel()) * fresh.element_size());
  return fresh;
}

inline Tensor empty(Device device, std::initializer_list<int64_t> sizes, int32_t dtype) {
  return empty(device, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

}  // namespace mmfast
