// A block of kThreads threads as kernels see it: on the GPU one thread of it, in tests on the CPU all of them in turn.
// A kernel is written as a row of steps, each of them each_thread(f), with barriers between; what a thread keeps from one step to the next is
// PerThread<T>. So the very code that runs on the GPU is run in tests without one, and its order of summation compared bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "../isa.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kThreads = 128;  // the lanes of all chains of a chunk (gramian.h)

#ifdef __CUDACC__
#define MMFAST_BLOCK __device__

struct Block {
  template <class T>
  struct PerThread {
    T value;
    __device__ T& operator()(int) { return value; }
  };
  template <class F>
  __device__ void each_thread(F f) const {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ void sync() const { __syncthreads(); }
  // x of the thread `offset` further on, among `width` neighbours, is added to x
  template <class T>
  __device__ void shuffle_down_add(PerThread<T>& x, int offset, int width) const {
    x.value += __shfl_down_sync(~0u, x.value, offset, width);
  }
};

// Copies an element to shared memory without a register, where it has 4 or 8 bytes; it is there for its thread once wait_group() has returned.
template <class T>
__device__ inline void cp_async(T* to, const T* from) {
  if constexpr (sizeof(T) >= 4) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(sizeof(T)) : "memory");
  } else {
    *to = *from;
  }
}
__device__ inline void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }  // for all but the `pending` youngest groups

// A partial sum that another block of this launch has written: from the L2 cache, which both see.
__device__ inline double load_partial(const double* p) { return __ldcg(p); }

// Where the block of that rank in the cluster has what this one has at p, in shared memory.
__device__ inline const double* peer_shared(const double* p, int64_t rank) {
#if __CUDA_ARCH__ >= 900
  const double* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(p), "r"(static_cast<unsigned>(rank)));
  return peer;
#else
  return p + rank * 0;
#endif
}
// The two halves of a cluster's barrier: what its blocks wrote before they arrive is seen after the wait. Not `.aligned`: a warp may come to it in parts.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Programmatic dependent launch. A kernel that begins while the one before it in the stream ends: from here on that one is over, and what it wrote is
// seen.
__device__ inline void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin as soon as every block has come by; it waits for the end of this one by itself.
__device__ inline void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }

#else
#define MMFAST_BLOCK

struct Block {
  template <class T>
  struct PerThread {
    T value[kThreads];
    T& operator()(int thread) { return value[thread]; }
  };
  template <class F>
  void each_thread(F f) const {
    for (int t = 0; t < kThreads; ++t) f(t);
  }
  void sync() const {}
  template <class T>
  void shuffle_down_add(PerThread<T>& x, int offset, int width) const {
    T moved[kThreads];
    for (int t = 0; t < kThreads; ++t) moved[t] = t % width + offset < width ? x(t + offset) : x(t);
    for (int t = 0; t < kThreads; ++t) x(t) += moved[t];
  }
};

inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

#endif

}  // namespace MMFAST_ISA
}  // namespace mmfast
