// What the library can do on a device, and what calls may make use of. But for limits(), nothing here loads or compiles a kernel, or makes a context.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>

#include "architectures.h"
#include "kernels.h"

namespace mmfast {
namespace gpu {
namespace {

struct Allowed {
  int64_t paths = -1;  // bits by the number of a path, and kOverlapBit
  Limits tuned{};      // its cluster_bytes and share_kept
};

std::mutex lock;
std::map<int, Limits> known;     // what each device has,
std::map<int, Allowed> allowed;  // and what of it calls may use
thread_local Forced forced_by_thread;

struct Capability {
  cudaError_t error;
  int major, minor;
};

Capability capability_of(int device) {
  Capability found{};
  found.error = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, device);
  if (found.error == cudaSuccess) found.error = cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, device);
  if (found.error != cudaSuccess) cudaGetLastError();  // asking is no error of the caller's
  return found;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// A runtime runs with every driver of its major version, but that driver compiles no PTX that is younger than itself.
bool can_compile(int driver, int runtime) { return driver >= runtime; }

std::string reason(int device) {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) driver = 0, cudaGetLastError();
  if (driver == 0) return "there is no NVIDIA driver";
  // of the runtime's major version at least; kernels with more than 4 KB of arguments came with 12.1
  const int needed = runtime / 1000 > 12 ? runtime / 1000 * 1000 : 12010;
  if (driver < needed)
    return "the driver knows CUDA " + version(driver) + ", a library built with CUDA " + version(runtime) + " needs one that knows " + version(needed) +
           ": update the driver, or build with an older toolkit, down to 12.1";
  const Capability found = capability_of(device);
  if (found.error != cudaSuccess) return "device " + std::to_string(device) + " does not answer: " + cudaGetErrorString(found.error);
  const std::string holds = "of compute capability " + std::to_string(found.major) + "." + std::to_string(found.minor) + ": the library holds code for " + architectures();
  const Code code = code_for(architectures(), found.major, found.minor);
  if (code == Code::none) return "there is no code for device " + std::to_string(device) + ", " + holds;
  if (code == Code::ptx && !can_compile(driver, runtime))
    return "the driver, for CUDA " + version(driver) + ", cannot compile the PTX of CUDA " + version(runtime) + " for device " + std::to_string(device) + ", " + holds;
  return "";
}

}  // namespace

const char* architectures() { return MMFAST_CUDA_ARCHITECTURES; }

const char* why_not(int device) {
  static thread_local std::string found;
  found = reason(device);
  return found.empty() ? nullptr : found.c_str();
}

Code code(int device) {
  if (why_not(device)) return Code::none;
  const Capability found = capability_of(device);
  return code_for(architectures(), found.major, found.minor);
}

Forced& forced() { return forced_by_thread; }

Limits device_limits(int device) {
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const std::optional<Limits> limits = ask(device);
  return limits ? known[device] = *limits : Limits{};  // no path but that of two passes, until it answers
}

Limits limits(int device) {
  Limits limits = device_limits(device);
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = allowed.find(device);
  if (found == allowed.end()) return limits;
  const auto [paths, tuned] = found->second;
  auto may = [paths = paths](Path path) { return (paths >> static_cast<int>(path) & 1) != 0; };
  limits.persistent = limits.persistent && may(Path::persistent);  // linear branches may have blocks that wait all the same
  limits.per_sample = limits.per_sample && may(Path::per_sample);
  limits.cluster = may(Path::cluster) ? limits.cluster : 0;
  limits.overlap = limits.overlap && (paths & kOverlapBit);
  limits.cluster_bytes = tuned.cluster_bytes, limits.share_kept = tuned.share_kept;
  return limits;
}

void allow(int device, int64_t paths) {
  const std::lock_guard<std::mutex> guard(lock);
  allowed[device].paths = paths;
}

void tune(int device, int64_t cluster_bytes, double share_kept) {
  const std::lock_guard<std::mutex> guard(lock);
  allowed[device].tuned.cluster_bytes = cluster_bytes, allowed[device].tuned.share_kept = share_kept;
}

int64_t paths(int device) {
  if (why_not(device)) return 0;
  const Limits limits = device_limits(device);
  auto bit = [](Path path, bool has) { return has ? int64_t{1} << static_cast<int>(path) : 0; };
  return bit(Path::two_pass, true) | bit(Path::persistent, limits.cooperative) | bit(Path::per_sample, limits.per_sample && limits.processors) |
         bit(Path::cluster, limits.cluster) | (limits.overlap ? kOverlapBit : 0);
}

}  // namespace gpu
}  // namespace mmfast
