// A CUDA runtime that launches nothing: it notes what is asked of it, answers with the errors that a test wants, and says it is the device of a test.
// Linked with the objects of csrc/cuda it shows how they launch, and what they do where that is refused (tests/test_cuda_launch.py).
#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace {

std::map<std::string, int64_t> device;  // what a test has set: attributes and versions by name, see number() below
std::map<const void*, std::string> kernels;
std::string log_, message;
std::map<std::string, std::pair<int, int>> faults;  // of kernels whose name holds the word: the error, and how many launches it hits
cudaError_t last_error = cudaSuccess;

int64_t number(const char* name, int64_t otherwise) {
  const auto found = device.find(name);
  return found == device.end() ? otherwise : found->second;
}

cudaError_t answer(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void set_number(const char* name, int64_t value) { device[name] = value; }
EXPORT void set_fault(const char* kernel, int error, int launches) { faults[kernel] = {error, launches}; }
EXPORT void leave_error(int error) { last_error = static_cast<cudaError_t>(error); }
EXPORT int error_left() { return last_error; }
// What was launched since it was last asked: "kernel:blocks:mode", one after the other.
EXPORT const char* launches() {
  static std::string told;
  told.swap(log_), log_.clear();
  return told.c_str();
}
EXPORT const char* why() { return message.c_str(); }

extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { kernels[host] = name; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 1; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const int mode = config->numAttrs ? static_cast<int>(config->attrs[0].id) : 0;
  const std::string& name = kernels.at(kernel);
  log_ += name + ":" + std::to_string(config->gridDim.x) + ":" +
          (mode == cudaLaunchAttributeCooperative ? "cooperative" : mode == cudaLaunchAttributeClusterDimension ? "cluster" : mode ? "dependent" : "plain") + " ";
  for (auto& [word, fault] : faults)
    if (fault.second && name.find(word) != std::string::npos) return --fault.second, answer(static_cast<cudaError_t>(fault.first));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemset2DAsync(void*, size_t, int, size_t, size_t, cudaStream_t) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorIllegalAddress ? "an illegal address" : "some error"; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = static_cast<int>(number("driver", 13000)), cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = static_cast<int>(number("runtime", 13000)), cudaSuccess; }
cudaError_t cudaGetDevice(int* current) { return *current = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int index) {
  if (index >= number("devices", 1)) return answer(cudaErrorInvalidDevice);
  switch (what) {
    case cudaDevAttrComputeCapabilityMajor: *value = static_cast<int>(number("capability", 90) / 10); break;
    case cudaDevAttrComputeCapabilityMinor: *value = static_cast<int>(number("capability", 90) % 10); break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute what, int) {
  return what == cudaFuncAttributeNonPortableClusterSizeAllowed && !number("non_portable", 1) ? answer(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) { return found->ptxVersion = 90, cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  return *clusters = config->gridDim.x <= number("cluster", 16), cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int, size_t, unsigned) {
  log_ += "occupancy_of_" + kernels.at(kernel) + ":0:asked ";
  return *blocks = 4, cudaSuccess;
}
}

using namespace mmfast;

namespace {

constexpr int kRows = 3;
const void* const kNoData[kRows] = {};
const int kIndex[kRows] = {0, 1, 2};
const int64_t kSteps[] = {0, 0};

// 1 where f() returns true, 0 for false, -1 where it throws.
template <class F>
int outcome(F f) {
  try {
    return f();
  } catch (const std::exception& error) {
    return message = error.what(), -1;
  }
}

SolveArgs solve_args(int64_t batch) {
  SolveArgs args{};
  args.batch = batch, args.K = kRows, args.steps = kSteps, args.n_steps = 1;
  return args;
}

}  // namespace

EXPORT int resolve(int64_t batch, int64_t inner, int per) {
  const Grads g{Dtype::f32, kNoData, kRows, kIndex, kRows, batch, inner, static_cast<Per>(per), nullptr, 0};
  const Limits limits = gpu::limits(0);
  return outcome([&] { return gpu::resolve_fused(g, solve_args(batch), nullptr, gpu::plan(g, 0, limits), limits, nullptr, nullptr, nullptr); });
}

EXPORT int combine(bool overlap) {
  const Grads g{Dtype::f32, kNoData, kRows, kIndex, kRows, 1, 1000, Per::batch, nullptr, 0};
  return outcome([&] { return gpu::combine(g, nullptr, 0, false, {}, nullptr, overlap, nullptr), true; });
}

EXPORT int heads() {
  const Heads h{Dtype::f32, nullptr, nullptr, 1, 64, 96, 2048, nullptr, kRows, Per::batch, nullptr, 0};
  const SolveArgs args = solve_args(1);
  return outcome([&] { return gpu::heads(h, nullptr, args, nullptr, gpu::plan_heads(h, args, gpu::limits(0)), nullptr, nullptr, nullptr, nullptr, nullptr), true; });
}
