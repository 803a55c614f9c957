// Rules that do not look at the Gramian: Sum, Mean, Constant, Random.
#pragma once

#include "problem.h"

namespace mmfast {
namespace MMFAST_ISA {

template <>
struct Rule<0> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool reads_gramian = false;
  static constexpr const char* name = "Sum";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    each(team, p.k, [&](int i) { p.w[i] = 1.0; });
  }
};

template <>
struct Rule<1> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool reads_gramian = false;
  static constexpr const char* name = "Mean";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    each(team, p.k, [&](int i) { p.w[i] = 1.0 / p.k; });
  }
};

template <>
struct Rule<2> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool reads_gramian = false;
  static constexpr const char* name = "Constant";
  MMFAST_HD static bool takes(int K, int n_params) { return n_params == K; }
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    each(team, p.k, [&](int i) { p.w[i] = p.params[p.row_index[i]]; });
  }
};

// Random loss weighting (Lin et al., "Reasonable effectiveness of random weighting", 2022): softmax of standard normal draws.
template <>
struct Rule<3> : Rule<-1> {
  static constexpr bool exists = true;
  static constexpr bool reads_gramian = false;
  static constexpr const char* name = "Random";
  template <class Team>
  MMFAST_HD static void solve(const Team& team, Problem& p) {
    double* e = p.work;
    each(team, p.k, [&](int i) {
      const uint32_t index = 2u * static_cast<uint32_t>(p.row_index[i]);
      const double radius = sqrt(-2.0 * log(p.draw.uniform(index)));
      e[i] = exp(radius * cos(6.283185307179586 * p.draw.uniform(index + 1)));
    });
    const double total = team.sum(p.k, [&](int i) { return e[i]; });
    each(team, p.k, [&](int i) { p.w[i] = e[i] / total; });
  }
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
