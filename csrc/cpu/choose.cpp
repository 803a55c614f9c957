// Which instruction set runs: the widest that this processor has, or the one that MMFAST_CPU_ISA names.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mmfast {

Available available_kernels() {
  Available found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.tables[found.n++] = &kernels_avx512;
  if (avx2) found.tables[found.n++] = &kernels_avx2;
#endif
  found.tables[found.n++] = &kernels_portable;
  return found;
}

const CpuKernels* choose_kernels() {
  static const CpuKernels* chosen = [] {
    const char* wanted = std::getenv("MMFAST_CPU_ISA");
    const Available found = available_kernels();
    for (int i = 0; wanted && i < found.n; ++i)
      if (!std::strcmp(found.tables[i]->isa, wanted)) return found.tables[i];
    return found.tables[0];
  }();
  return chosen;
}

}  // namespace mmfast

// How Python asks the loaded library, through ctypes, what it runs.
extern "C" __attribute__((visibility("default"))) const char* mmfast_cpu_isa() { return mmfast::choose_kernels()->isa; }
