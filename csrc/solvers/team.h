// Who runs a solver: one thread on the CPU, a warp on the GPU. Sums have one order for both,
// so that the two agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "../isa.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr int kTeamLanes = 32;

struct Serial {
  MMFAST_HD int rank() const { return 0; }
  MMFAST_HD int size() const { return 1; }
  MMFAST_HD void sync() const {}

  // Sum of f(0..n-1): lane l takes l, l + 32, ... in order; the lanes then meet in a butterfly tree.
  template <class F>
  MMFAST_HD double sum(int n, F f) const {
    double lane[kTeamLanes];
    int m = 1;
    while (m < n && m < kTeamLanes) m *= 2;
    for (int l = 0; l < m; ++l) lane[l] = l < n ? f(l) : 0.0;
    for (int base = kTeamLanes; base < n; base += kTeamLanes)
      for (int l = 0; l < kTeamLanes && base + l < n; ++l) lane[l] += f(base + l);
    for (int stride = m / 2; stride > 0; stride /= 2)
      for (int l = 0; l < stride; ++l) lane[l] += lane[l + stride];
    return lane[0];
  }
};

// Runs f(i) for i in 0..n-1, shared among the team; every write is seen by all when it returns.
template <class Team, class F>
MMFAST_HD inline void each(const Team& team, int n, F f) {
  for (int i = team.rank(); i < n; i += team.size()) f(i);
  team.sync();
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
