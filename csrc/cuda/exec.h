// A block of kThreads threads as kernels see it: on the GPU one thread of it, in tests on the CPU all of them in turn.
// A kernel is written as a row of steps, each of them each(f), with barriers between; what a thread keeps from one step to the next is
// Per<T>. So the very code that runs on the GPU is run in tests without one, and its order of summation compared bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "../solvers/team.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kThreads = 128;  // the lanes of all chains of a chunk (gramian.h)

#ifdef __CUDACC__
#define MMFAST_BLOCK __device__

struct Block {
  template <class T>
  struct Per {
    T value;
    __device__ T& operator()(int) { return value; }
  };
  template <class F>
  __device__ void each(F f) const {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ void sync() const { __syncthreads(); }
  // x of the thread `stride` further on, among `lanes` neighbours, is added to x
  template <class T>
  __device__ void add_from(Per<T>& x, int stride, int lanes) const {
    x.value += __shfl_down_sync(~0u, x.value, stride, lanes);
  }
};

// A number on its way to shared memory without a register, where it is 4 or 8 bytes; there for its thread once wait() has let it through.
template <class T>
__device__ inline void copy_ahead(T* to, const T* from) {
  if constexpr (sizeof(T) >= 4) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(sizeof(T)) : "memory");
  } else {
    *to = *from;
  }
}
__device__ inline void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int later>
__device__ inline void wait_but_for() { asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory"); }  // the `later` youngest groups

// What other blocks of this launch have written: from the L2 cache, where they meet.
__device__ inline double from_others(const double* p) { return __ldcg(p); }

// Where the block of that rank in the cluster has what this one has at p, in shared memory.
__device__ inline const double* of_peer(const double* p, int64_t rank) {
#if __CUDA_ARCH__ >= 900
  const double* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(static_cast<unsigned>(rank)));
  return there;
#else
  return p + rank * 0;
#endif
}
// Between the two all blocks of the cluster have come by, and what they wrote before is seen after.
__device__ inline void arrive_in_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A kernel that begins while the one before it in the stream ends: from here on that one is over, and what it wrote is seen.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin as soon as every block has come by; it waits for the end of this one by itself.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

#else
#define MMFAST_BLOCK

struct Block {
  template <class T>
  struct Per {
    T value[kThreads];
    T& operator()(int thread) { return value[thread]; }
  };
  template <class F>
  void each(F f) const {
    for (int t = 0; t < kThreads; ++t) f(t);
  }
  void sync() const {}
  template <class T>
  void add_from(Per<T>& x, int stride, int lanes) const {
    T moved[kThreads];
    for (int t = 0; t < kThreads; ++t) moved[t] = t % lanes + stride < lanes ? x(t + stride) : x(t);
    for (int t = 0; t < kThreads; ++t) x(t) += moved[t];
  }
};

template <class T>
inline void copy_ahead(T* to, const T* from) {
  *to = *from;
}
inline void end_group() {}
template <int later>
inline void wait_but_for() {}
inline double from_others(const double* p) { return *p; }
inline thread_local const double* const* peers = nullptr;  // what each block of the cluster has at the place that is asked for
inline const double* of_peer(const double*, int64_t rank) { return peers[rank]; }

inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }

#endif

}  // namespace MMFAST_ISA
}  // namespace mmfast
