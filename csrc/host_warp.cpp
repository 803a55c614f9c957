// The solvers run by a team of 32 threads, as a warp of the GPU runs them: shows that they agree with one thread, bit for bit.
#include "host.h"

#include <algorithm>
#include <string>

#define MMFAST_ISA host_warp
#include "cuda/threads.h"
#include "solvers/solve.h"

namespace mmfast {
namespace {

py::tuple solve(const Doubles& G, const std::vector<int64_t>& steps, const std::vector<double>& params, const std::optional<Bools>& mask,
                const std::optional<Doubles>& state, uint64_t seed, uint32_t counter, bool preserve_norm) {
  if (G.ndim() != 2 || G.shape(0) != G.shape(1) || G.shape(0) < 1 || G.shape(0) > 256) throw py::value_error("G must have shape [K, K] with K from 1 to 256");
  const int K = static_cast<int>(G.shape(0));
  const host_warp::Chain chain{steps.data(), static_cast<int>(steps.size() / 2), params.data(), preserve_norm};
  const int size = host_warp::chain_state_size(chain, K);
  if (state && state->size() != size) throw py::value_error("state must hold " + std::to_string(size) + " numbers");
  Doubles w(K), next(size);
  std::fill_n(next.mutable_data(), size, 0.0);
  if (state) std::copy_n(state->data(), size, next.mutable_data());
  std::vector<double> work(static_cast<size_t>(host_warp::solve_work_size(K, size)));
  std::vector<int> iwork(static_cast<size_t>(host_warp::solve_iwork_size(K)));
  const host_warp::Io io{G.data(), mask ? mask->data() : nullptr, size ? next.mutable_data() : nullptr, seed, counter, 0, w.mutable_data()};
  {
    const py::gil_scoped_release release;
    host_warp::as_team([&](const host_warp::Threads& team) { host_warp::solve(team, chain, K, io, work.data(), iwork.data()); });
  }
  return py::make_tuple(w, next);
}

}  // namespace

void define_warp(py::module_& m) {
  using namespace py::literals;
  m.def("warp_solve", &solve, "G"_a, "steps"_a, "params"_a, "mask"_a = py::none(), "state"_a = py::none(), "seed"_a = 0, "counter"_a = 0,
        "preserve_norm"_a = false, "solve() for one Gramian [K, K], by 32 threads that work together as a warp does.");
}

}  // namespace mmfast
