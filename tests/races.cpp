// Solves the problems that races.py writes to standard input by teams of 32 threads; compiled with ThreadSanitizer, which ends it at the first
// number that one member reads or writes while another may be writing it.
#include <iostream>
#include <string>
#include <vector>

#define MMFAST_ISA races
#include "cuda/threads.h"
#include "solvers/solve.h"

using namespace mmfast::races;

template <class T>
std::vector<T> read_list() {
  size_t n = 0;
  std::cin >> n;
  std::vector<T> list(n);
  for (T& x : list) {
    std::string word;  // a stream does not read "inf"
    std::cin >> word;
    x = static_cast<T>(std::stod(word));
  }
  return list;
}

int main() {
  int problems = 0;
  for (std::string name; std::cin >> name; ++problems) {
    const auto steps = read_list<int64_t>();
    const auto params = read_list<double>(), G = read_list<double>();
    int K = 0;
    while (static_cast<size_t>(K) * K < G.size()) ++K;
    const Chain chain{steps.data(), static_cast<int>(steps.size() / 2), params.data(), true};
    std::vector<double> state(static_cast<size_t>(chain_state_size(chain, K)) + 1), w(K), work(static_cast<size_t>(solve_work_size(K, static_cast<int>(state.size()))));
    std::vector<int> iwork(static_cast<size_t>(solve_iwork_size(K)));
    std::cerr << name << " K = " << K << "\n";
    as_team([&](const Threads& team) { solve(team, chain, K, {G.data(), nullptr, state.data(), 5, 1, 0, w.data()}, work.data(), iwork.data()); });
  }
  std::cout << problems << " problems without a race\n";
}
