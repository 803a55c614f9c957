// torch's own threads, as the kernels use them.
#pragma once

#include "cpu/kernels.h"
#include "torch_api.h"

namespace mmfast {

inline Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, ctx); });
          }};
}

}  // namespace mmfast
