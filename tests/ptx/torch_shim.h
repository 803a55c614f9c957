// Included before csrc/ops_cuda.cpp, which is compiled as it is: CPU tensors count as those of a CUDA device, what it allocates comes from the stand-in,
// and its operators are registered for the CPU in a library of their own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "runtime.h"

namespace ptx {

inline AOTITorchError device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError device_index(AtenTensorHandle, int32_t* index) {
  *index = device::current();
  return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t, AtenTensorHandle* fresh) {
  int64_t bytes = dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
  for (int64_t i = 0; i < dim; ++i) bytes *= sizes[i];
  return aoti_torch_create_tensor_from_blob(device::allocate(static_cast<uint64_t>(bytes)), dim, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0, fresh);
}

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace ptx

// Elsewhere in torch's CUDA library.
extern "C" inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

namespace torch::stable::accelerator {
using NoGuard = ptx::NoGuard;
}

#define aoti_torch_get_device_type ptx::device_type
#define aoti_torch_get_device_index ptx::device_index
#define aoti_torch_empty_strided ptx::empty_strided
#define DeviceGuard NoGuard
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(mmfast_ptx, CPU, m, C10_UID)
