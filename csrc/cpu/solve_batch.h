// Batches of K x K problems over the thread pool; each is solved by one thread, so threads never change a bit.
#pragma once

#include <cstdlib>
#include <new>

#include "../solvers/solve.h"
#include "kernels.h"

namespace mmfast {
namespace MMFAST_ISA {

// Scratch on the stack for small problems, on the heap for others, and always there where a sanitizer watches its exact size.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kMayUseStack = false;
#else
constexpr bool kMayUseStack = true;
#endif

template <class T, int kOnStack>
struct Scratch {
  T small[kOnStack];
  T* data;
  explicit Scratch(int64_t n) : data(n <= kOnStack && kMayUseStack ? small : static_cast<T*>(std::malloc(n * sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() {
    if (data != small) std::free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

inline bool accepts(const SolveArgs& a) {
  bool all = true;
  for (int s = 0; s < a.n_steps; ++s) {
    const int id = a.steps[2 * s] >= 0 && a.steps[2 * s] < kMaxRules ? static_cast<int>(a.steps[2 * s]) : kMaxRules;
    const int64_t n = a.steps[2 * s + 1];
    all = n >= 0 && with_rule(id, [&](auto rule) { all = all && decltype(rule)::takes(a.K, static_cast<int>(n)) && (s > 0 || !decltype(rule)::smooths); }) && all;
  }
  return all;
}

inline int64_t state_size(const SolveArgs& a) { return chain_state_size({a.steps, a.n_steps, a.params, a.preserve_norm}, a.K); }

// norm, if given, takes for each problem what its weights are still to be multiplied by.
inline void solve_range(const SolveArgs& a, int64_t begin, int64_t end, Norm* norm = nullptr) {
  Scratch<double, 1024> work(solve_work_size(a.K, a.state ? static_cast<int>(a.state_stride) : 0));
  Scratch<int, 256> iwork(solve_iwork_size(a.K));
  const Chain chain{a.steps, a.n_steps, a.params, a.preserve_norm, a.precision};
  for (int64_t b = begin; b < end; ++b) {
    const Io io{a.G + b * a.G_stride, a.mask ? a.mask + b * a.mask_stride : nullptr, a.state ? a.state + b * a.state_stride : nullptr,
                a.seed, a.counter, static_cast<uint32_t>(b), a.w + b * a.w_stride, norm && a.preserve_norm ? norm + (b - begin) : nullptr};
    solve(Serial{}, chain, a.K, io, work.data, iwork.data);
  }
}

inline void solve_batch(const Pool& pool, const SolveArgs& a) {
  if (a.batch == 1) return solve_range(a, 0, 1);
  const int64_t grain = 1 + 4096 / (static_cast<int64_t>(a.K) * a.K * a.K + 64);
  pool.run(a.batch, grain, [](int64_t begin, int64_t end, void* ctx) { solve_range(*static_cast<const SolveArgs*>(ctx), begin, end); },
           const_cast<SolveArgs*>(&a));
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
