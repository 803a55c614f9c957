// A team of 32 threads of the CPU in place of a warp: shows where there is no GPU that the solvers are right for a team.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "../solvers/team.h"

namespace mmfast {
namespace MMFAST_ISA {

class Threads {
 public:
  // What the members share.
  struct SharedState {
    pthread_barrier_t barrier;
    double values[kTeamLanes];
    SharedState() { pthread_barrier_init(&barrier, nullptr, kTeamLanes); }
    ~SharedState() { pthread_barrier_destroy(&barrier); }
  };

  Threads(SharedState& shared, int rank) : shared_(shared), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return kTeamLanes; }
  void sync() const { pthread_barrier_wait(&shared_.barrier); }

  // warp.h, with an array in place of shuffles
  template <class F>
  double sum(int n, F f) const {
    double value = rank_ < n ? f(rank_) : 0.0;
    for (int i = rank_ + kTeamLanes; i < n; i += kTeamLanes) value += f(i);
    shared_.values[rank_] = value;
    sync();
    double lanes[kTeamLanes];
    std::copy(shared_.values, shared_.values + kTeamLanes, lanes);
    sync();
    int m = 1;
    while (m < n && m < kTeamLanes) m *= 2;
    for (int stride = m / 2; stride > 0; stride /= 2)
      for (int l = 0; l < stride; ++l) lanes[l] += lanes[l + stride];
    return lanes[0];
  }

 private:
  SharedState& shared_;
  int rank_;
};

// f(team) by each of its 32 members at once.
template <class F>
void as_team(F f) {
  Threads::SharedState shared;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kTeamLanes; ++rank) threads.emplace_back([&, rank] { f(Threads(shared, rank)); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
