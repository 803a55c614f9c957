// A stand-in for the CUDA runtime: what the launch code of csrc/cuda calls, of devices whose numbers tests choose and with faults that tests ask for.
// Exported functions (ptx_*) are device.py's; a launch runs to its end before it returns.
#include "runtime.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Chip {
  int processors, shared_block, shared_processor, capability, cluster, blocks_per_processor;
};
struct Fault {
  std::string kind, kernel, mode;
};
struct Allocation {
  void* base;
  size_t size;
};

std::vector<Chip> chips;
int chip = 0;
int driver_version = CUDART_VERSION, runtime_version = CUDART_VERSION;
bool has_image = true;
uint64_t seed = 1;
long launches = 0;
std::string launched;  // "kernel mode\n" of each
std::vector<Fault> faults;
std::vector<Allocation> allocations;
std::string failure;  // of the last launch that stopped
cudaError_t last_error = cudaSuccess;
bool dead = false;  // an error that every later call returns
bool hangs = false;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}
std::map<std::pair<int, const void*>, int> shared_allowed;  // by device and function

// An error is returned, and kept for cudaGetLastError.
cudaError_t result(cudaError_t error) {
  if (dead) return cudaErrorIllegalAddress;
  if (error != cudaSuccess) last_error = error;
  return error;
}

const Fault* fault_of(const std::string& kernel, const char* mode) {
  for (const Fault& fault : faults)
    if (kernel.find(fault.kernel) != std::string::npos && (fault.mode.empty() || fault.mode == mode)) return &fault;
  return nullptr;
}

int allowed_shared(const void* function) {
  const auto found = shared_allowed.find({chip, function});
  return found == shared_allowed.end() ? 48 << 10 : found->second;
}

// Blocks of a kernel that a processor has room for.
int blocks_that_fit(const Kernel& kernel, int threads, size_t shared) {
  constexpr int kReserved = 1024;
  const Chip& c = chips[chip];
  const long by_shared = c.shared_processor / (static_cast<long>(shared) + kernel.static_shared + kReserved), by_registers = 65536 / (128 * threads);
  return static_cast<int>(std::min({by_shared, by_registers, static_cast<long>(c.blocks_per_processor)}));
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, const char* mode, unsigned cluster) {
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  const std::string& name = names()[function];
  const Kernel* kernel = find_kernel(name);
  const Chip& c = chips[chip];
  const bool together = !std::strcmp(mode, "cooperative");
  if (dead) return result(cudaErrorIllegalAddress);
  if (!kernel || !has_image) return result(cudaErrorNoKernelImageForDevice);
  if (grid.z != 1 || block.y != 1 || block.z != 1 || !grid.x || !grid.y || grid.y > 65535 || !block.x || block.x > 1024) return result(cudaErrorInvalidConfiguration);
  if (static_cast<int>(shared) > allowed_shared(function)) return result(cudaErrorInvalidValue);
  if (cluster && (static_cast<int>(cluster) > c.cluster || grid.x % cluster)) return result(cudaErrorInvalidClusterSize);
  const long blocks = static_cast<long>(grid.x) * grid.y;
  if (together && blocks > static_cast<long>(c.processors) * blocks_that_fit(*kernel, static_cast<int>(block.x), shared)) return result(cudaErrorCooperativeLaunchTooLarge);
  const Fault* fault = fault_of(name, mode);
  if (fault && fault->kind == "refuse") return result(together ? cudaErrorCooperativeLaunchTooLarge : cudaErrorLaunchOutOfResources);
  ++launches;
  launched += name + ' ' + mode + '\n';
  if (fault && fault->kind == "sticky") dead = true;
  if (fault && fault->kind == "hang") hangs = true;
  if (dead) return result(cudaErrorIllegalAddress);
  if (hangs) return cudaSuccess;  // and so does all that comes after it in the stream
  failure = run({kernel, {grid.x, grid.y}, block.x, arguments, static_cast<uint32_t>(shared), together, cluster, fault != nullptr}, seed++);
  return result(failure.empty() ? cudaSuccess : cudaErrorUnknown);
}

}  // namespace

namespace device {

int current() { return chip; }

void* allocate(uint64_t size) {
  constexpr uint64_t kPage = 4096;
  const uint64_t whole = (size + kPage - 1) / kPage * kPage;
  char* base = static_cast<char*>(mmap(nullptr, whole + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::memset(base, 0xff, whole);
  mprotect(base + whole, kPage, PROT_NONE);
  allocations.push_back({base, whole + kPage});
  return base + whole - size;
}

}  // namespace device

// What tests set and read.

EXPORT int ptx_add_chip(int processors, int shared_block, int shared_processor, int capability, int cluster, int blocks_per_processor) {
  chips.push_back({processors, shared_block, shared_processor, capability, cluster, blocks_per_processor});
  return static_cast<int>(chips.size()) - 1;
}
EXPORT int ptx_chip() { return chip; }
EXPORT int ptx_use_chip(int number) { return std::exchange(chip, number); }
EXPORT void ptx_versions(int driver, int runtime, int image) { driver_version = driver, runtime_version = runtime, has_image = image; }
EXPORT void ptx_seed(uint64_t number) { seed = number; }
EXPORT void ptx_add_fault(const char* kind, const char* kernel, const char* mode) { faults.push_back({kind, kernel, mode}); }
EXPORT void ptx_reset() { faults.clear(), last_error = cudaSuccess, dead = hangs = false, race_count = 0, race_reports.clear(), failure.clear(); }
EXPORT int ptx_busy() { return hangs; }
EXPORT long ptx_launches() { return launches; }
EXPORT const char* ptx_launched() {  // since it was asked last
  static std::string answer;
  answer = std::exchange(launched, {});
  return answer.c_str();
}
EXPORT long ptx_races() { return race_count; }
EXPORT const char* ptx_reports() {
  static std::string answer;
  answer.clear();
  for (const std::string& report : race_reports) answer += report + '\n';
  return answer.c_str();
}
EXPORT void ptx_release() {
  for (const Allocation& a : allocations) munmap(a.base, a.size);
  allocations.clear();
}
EXPORT int ptx_sites() { return static_cast<int>(all_sites().size()); }
EXPORT const char* ptx_site(int number) {
  static std::string answer;
  const Site& site = *all_sites()[number];
  answer = std::string(site.kind) + ' ' + site.function + ' ' + site.file + ' ' + std::to_string(site.line);
  return answer.c_str();
}
EXPORT void ptx_without(int number, int without) { all_sites()[number]->without = without; }

// The runtime.

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) { names()[function] = name; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// kernel<<<grid, block, shared, stream>>>(...) pushes, and its stub pops
static struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, "plain", 0);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(function, grid, block, arguments, shared, "plain", 0);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const char* mode = "plain";
  unsigned cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) mode = "cooperative";
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) mode = "dependent";
    if (attribute.id == cudaLaunchAttributeClusterDimension) mode = "cluster", cluster = attribute.val.clusterDim.x;
  }
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, mode, cluster);
}

cudaError_t cudaGetLastError() { return dead ? cudaErrorIllegalAddress : std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return dead ? cudaErrorIllegalAddress : last_error; }
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = error == cudaErrorUnknown && !failure.empty() ? failure : "CUDA error " + std::to_string(error);
  return text.c_str();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return result(cudaSuccess);
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = runtime_version;
  return result(cudaSuccess);
}
cudaError_t cudaGetDevice(int* number) {
  *number = chip;
  return result(cudaSuccess);
}
cudaError_t cudaSetDevice(int) { return result(cudaSuccess); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(chips.size());
  return result(cudaSuccess);
}
cudaError_t cudaStreamQuery(cudaStream_t) { return dead ? cudaErrorIllegalAddress : hangs ? cudaErrorNotReady : cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaStreamQuery(nullptr); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return result(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const Chip& c = chips[number];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = c.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = c.shared_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = c.shared_processor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrClusterLaunch: *value = c.cluster > 0; break;
    case cudaDevAttrComputeCapabilityMajor: *value = c.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = c.capability % 10; break;
    default: return result(cudaErrorInvalidValue);
  }
  return result(cudaSuccess);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > chips[chip].shared_block) return result(cudaErrorInvalidValue);
    shared_allowed[{chip, function}] = value;
  }
  return result(cudaSuccess);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (!has_image) return result(cudaErrorNoKernelImageForDevice);
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = chips[chip].capability;
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  *clusters = static_cast<int>(config->gridDim.x) <= chips[chip].cluster;
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads, size_t shared, unsigned) {
  const Kernel* kernel = find_kernel(names()[function]);
  if (!kernel || !has_image) return result(cudaErrorNoKernelImageForDevice);
  *blocks = blocks_that_fit(*kernel, threads, shared);
  return result(cudaSuccess);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) {
  if (!dead && !hangs) std::memset(at, value, size);
  return result(cudaSuccess);
}
cudaError_t cudaMemset2DAsync(void* at, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height && !dead && !hangs; ++row) std::memset(static_cast<char*>(at) + row * pitch, value, width);
  return result(cudaSuccess);
}

}  // extern "C"
