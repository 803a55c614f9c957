// Work shared out over torch's threads.
#pragma once

#include "kernels.h"

#ifndef MMFAST_ISA
#define MMFAST_ISA portable
#endif

namespace mmfast {
namespace MMFAST_ISA {

constexpr Pool kSerial{1, nullptr};

// f(begin, end) over disjoint ranges that cover 0..n-1; in this thread alone when there is little `work` (elements read).
template <class F>
inline void run(const Pool& pool, int64_t n, int64_t work, const F& f) {
  if (work <= 32768 || pool.threads == 1 || n == 1) return f(int64_t{0}, n);
  pool.run(n, 1, [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); }, const_cast<F*>(&f));
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
