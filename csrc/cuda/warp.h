// A warp as the team of a solver (solvers/team.h): sums in the very order of one thread, so both give the same bits.
#pragma once

#include "../solvers/solve.h"

namespace mmfast {
namespace MMFAST_ISA {

struct Warp {
  __device__ int rank() const { return static_cast<int>(threadIdx.x % kTeamLanes); }
  __device__ int size() const { return kTeamLanes; }
  __device__ void sync() const { __syncwarp(); }

  template <class F>
  __device__ double sum(int n, F f) const {
    const int lane = rank();
    __syncwarp();  // shuffles order no memory
    int m = 1;
    while (m < n && m < kTeamLanes) m *= 2;
    double value = lane < n ? f(lane) : 0.0;
    for (int i = lane + kTeamLanes; i < n; i += kTeamLanes) value += f(i);
    for (int stride = m / 2; stride > 0; stride /= 2) value += __shfl_down_sync(~0u, value, stride);
    return __shfl_sync(~0u, value, 0);
  }
};

// Doubles that a problem of K rows is solved in.
MMFAST_HD inline int64_t scratch_doubles(int K, int state_size) { return solve_work_size(K, state_size) + (solve_iwork_size(K) + 1) / 2; }

}  // namespace MMFAST_ISA
}  // namespace mmfast
