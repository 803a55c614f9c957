#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mmfast {
namespace gpu {

OnDevice::OnDevice(int device) : before_(-1), changed_(false) {
  cudaError_t error = cudaGetDevice(&before_);
  if (error == cudaSuccess && before_ != device) {
    error = cudaSetDevice(device);
    changed_ = error == cudaSuccess;
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string("mmfast: CUDA device ") + std::to_string(device) + ": " + cudaGetErrorString(error));
}

OnDevice::~OnDevice() {
  if (changed_) cudaSetDevice(before_);
}

}  // namespace gpu
}  // namespace mmfast
