// Work shared out over torch's threads.
#pragma once

#include "../isa.h"
#include "kernels.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr Pool kSerial{1, nullptr};
constexpr int64_t kSmallWork = 32768;  // elements: below it a second thread costs more than it does

// f(begin, end) over disjoint ranges that cover 0..n-1, on all threads. Each has a part of its own, the same in every call, so that what
// it read last time is still in its caches; it takes it in pieces (from the end when `backwards`), and then helps the others with
// theirs: a thread that the system holds up does not hold up the call.
template <bool backwards = false, class F>
inline void parallel_for(const Pool& pool, int64_t n, const F& f) {
  constexpr int64_t kMaxParts = 256, kPieces = 16;
  struct alignas(64) Part {
    int64_t taken;
  };
  struct Call {
    const F& f;
    int64_t n, parts;
    Part part[kMaxParts];
    Call(const F& f, int64_t n, int64_t parts) : f(f), n(n), parts(parts) {
      for (int64_t p = 0; p < parts; ++p) part[p].taken = 0;
    }
    void work(int64_t first) {
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t p = (first + i) % parts, begin = n * p / parts, end = n * (p + 1) / parts;
        const int64_t size = (end - begin + kPieces - 1) / kPieces;
        for (;;) {
          const int64_t done = size * __atomic_fetch_add(&part[p].taken, 1, __ATOMIC_RELAXED);
          if (done >= end - begin) break;
          const int64_t left = end - begin - done, count = size < left ? size : left;
          backwards ? f(begin + left - count, begin + left) : f(begin + done, begin + done + count);
        }
      }
    }
  };
  int64_t parts = pool.threads < kMaxParts ? pool.threads : kMaxParts;
  if (parts > n) parts = n;
  Call call(f, n, parts);
  pool.run(parts, 1, [](int64_t begin, int64_t end, void* ctx) {
    for (; begin < end; ++begin) static_cast<Call*>(ctx)->work(begin);
  }, &call);
}

// The same, in this thread alone when there is little `work` (elements read).
template <class F>
inline void parallel_for(const Pool& pool, int64_t n, int64_t work, const F& f) {
  if (work <= kSmallWork || pool.threads == 1 || n <= 1) return f(int64_t{0}, n);
  parallel_for(pool, n, f);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
