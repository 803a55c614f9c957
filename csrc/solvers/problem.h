// One K x K problem as a rule sees it, and what every rule declares about itself.
//
// The driver (solve.h) leaves out missing rows, divides the Gramian by a power of four and hands a rule
// the dense rest: a rule never meets a zero row, a non-finite number, or an extreme overall scale.
#pragma once

#include "philox.h"
#include "team.h"

namespace mmfast {
namespace MMFAST_ISA {

constexpr double kCancelled = 1e-14;  // a squared norm below this part of its summands' squared sum is their rounding error

struct Problem {
  int k;                 // rows that take part, >= 1
  int K;                 // rows of the whole problem
  const int* row_index;  // [k] which rows of the whole problem they are, ascending
  const double* G;       // [k, k] Gramian / scale; its trace lies in [1, 4)
  double scale;          // a power of four, so that sqrt(scale) is exact
  const double* params;  // [n_params] hyper-parameters, in the order of the Python rule's params()
  int n_params;
  double* state;         // [Rule::state_size(K)] in and out, laid out for the whole problem; zeros at first
  Draw draw;             // the random stream of this problem and step
  double* w;             // [k] out: the weights
  double* map;           // [k, k] out, only for rules that map rows: row i becomes sum_j map[i, j] g_j
  double* work;          // [work_size(k)] scratch, contents undefined
  int* iwork;            // [iwork_size(k)] scratch, contents undefined
  double precision;      // relative rounding of the entries of G: that of float64, or of the float32 it was summed in
  double lift;           // part of each squared norm on the diagonal of G that the gradients do not have, see solve.h
};

MMFAST_HD inline long work_size(int k) { return 8L * k * k + 64L * k + 64; }
MMFAST_HD inline long iwork_size(int k) { return 8L * k + 64; }

// The preference of row i: one of the K parameters that follow the `first` ones, or `otherwise` where there are none.
MMFAST_HD inline double preference(const Problem& p, int i, int first, double otherwise) {
  return p.n_params > first ? p.params[first + p.row_index[i]] : otherwise;
}

// A rule is a specialisation of this template in its family's header:
//   exists = true; name = the Python class; maps_rows = whether it fills map (then w is summed by the driver);
//   smooths = whether it changes the weights of the step before instead of making its own (CRMOGM, Hold);
//   holds = whether it may keep the step before from being solved, where due(problem, state) is false (Hold);
//   lifts = whether it follows the inverse of the Gramian, and must not follow its rounding; reads_gramian = whether it looks at it at all;
//   takes(K, n_params): whether so many parameters are right; state_size(K); solve(team, problem).
template <int id>
struct Rule {
  static constexpr bool exists = false;
  static constexpr bool maps_rows = false;
  static constexpr bool smooths = false;
  static constexpr bool holds = false;
  static constexpr bool lifts = false;
  static constexpr bool reads_gramian = true;
  static constexpr const char* name = "";
  MMFAST_HD static bool takes(int, int n_params) { return n_params == 0; }
  MMFAST_HD static int state_size(int) { return 0; }
  MMFAST_HD static bool due(const Problem&, const double*, const double*) { return true; }
  template <class Team>
  MMFAST_HD static void solve(const Team&, Problem&) {}
};

// A squared length below this part of its summands' squared sum is their rounding: its direction means nothing.
MMFAST_HD inline double cancelled(double precision) { return fmax(kCancelled, 8.0 * precision); }

constexpr int kMaxRules = 32;

}  // namespace MMFAST_ISA
}  // namespace mmfast
