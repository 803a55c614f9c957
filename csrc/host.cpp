// mmfast._host: the solvers on NumPy arrays, without torch, for tests and experiments. Built with MMFAST_HOST=1 only.
#include "host.h"

#include <cstring>
#include <string>

#define MMFAST_ISA host
#include "cpu/kernels.h"
#include "solvers/solve.h"

namespace mmfast {
namespace {

py::dict rules() {
  py::dict all;
  for (int id = 0; id < host::kMaxRules; ++id)
    host::with_rule(id, [&](auto rule) {
      using R = decltype(rule);
      all[py::int_(id)] = py::dict(py::arg("name") = R::name, py::arg("maps_rows") = R::maps_rows, py::arg("smooths") = R::smooths);
    });
  return all;
}

const CpuKernels* table(const std::optional<std::string>& isa) {
  if (!isa) return choose_kernels();
  const Available found = available_kernels();
  for (int i = 0; i < found.n; ++i)
    if (*isa == found.tables[i]->isa) return found.tables[i];
  throw py::value_error("isa is '" + *isa + "', which this processor or build does not have; see _host.isas()");
}

py::tuple solve(const Doubles& G, const std::vector<int64_t>& steps, const std::vector<double>& params, const std::optional<Bools>& mask,
                const std::optional<Doubles>& state, uint64_t seed, uint32_t counter, bool preserve_norm, const std::optional<std::string>& isa) {
  const std::vector<py::ssize_t> shape(G.shape(), G.shape() + G.ndim());
  const py::ssize_t K = G.ndim() >= 2 ? shape.back() : 0;
  if (K < 1 || K > 256 || shape[G.ndim() - 2] != K) throw py::value_error("G must have shape [..., K, K] with K from 1 to 256");
  const py::ssize_t batch = G.size() / (K * K);
  if (mask && mask->size() != K && mask->size() != batch * K) throw py::value_error("mask must have shape [K] or [..., K]");

  if (steps.size() % 2) throw py::value_error("steps must hold pairs (rule id, number of parameters)");
  int64_t n_params = 0;
  for (size_t s = 0; s < steps.size(); s += 2) {
    if (!host::with_rule(static_cast<int>(steps[s]), [](auto) {})) throw py::value_error("steps names rule " + std::to_string(steps[s]) + ", see _host.rules()");
    n_params += steps[s + 1];
  }
  if (n_params != static_cast<int64_t>(params.size())) throw py::value_error("params must hold as many numbers as steps says");
  const int size = host::chain_state_size({steps.data(), static_cast<int>(steps.size() / 2), params.data(), preserve_norm}, static_cast<int>(K));
  if (state && state->size() != batch * size) throw py::value_error("state must have shape [..., " + std::to_string(size) + "]");

  Doubles w(std::vector<py::ssize_t>(shape.begin(), shape.end() - 1));
  std::vector<py::ssize_t> state_shape(shape.begin(), shape.end() - 2);
  state_shape.push_back(size);
  Doubles next(state_shape);
  if (state)
    std::memcpy(next.mutable_data(), state->data(), next.nbytes());
  else
    std::memset(next.mutable_data(), 0, next.nbytes());

  SolveArgs args{};
  args.batch = batch;
  args.K = static_cast<int>(K);
  args.G = G.data();
  args.G_stride = K * K;
  args.mask = mask ? mask->data() : nullptr;
  args.mask_stride = mask && mask->size() == batch * K ? K : 0;
  args.steps = steps.data();
  args.n_steps = static_cast<int>(steps.size() / 2);
  args.params = params.data();
  if (!choose_kernels()->accepts(args)) throw py::value_error("params do not fit the rules that steps names");
  args.preserve_norm = preserve_norm;
  args.precision = 2.220446049250313e-16;
  args.state = size ? next.mutable_data() : nullptr;
  args.state_stride = size;
  args.seed = seed;
  args.counter = counter;
  args.w = w.mutable_data();
  args.w_stride = K;
  const Pool one_thread{1, [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* ctx) { body(0, n, ctx); }};
  if (batch) table(isa)->solve(one_thread, args);
  return py::make_tuple(w, next);
}

}  // namespace
}  // namespace mmfast

PYBIND11_MODULE(_host, m) {
  using namespace mmfast;
  using namespace py::literals;
  m.doc() = "The solvers of csrc/solvers on NumPy arrays, and what the build can do.";
  m.attr("compiler") = __VERSION__;
  m.attr("isa") = choose_kernels()->isa;
  m.def("isas", [] {
    const Available found = available_kernels();
    std::vector<std::string> names;
    for (int i = 0; i < found.n; ++i) names.emplace_back(found.tables[i]->isa);
    return names;
  }, "Instruction sets of this build that this processor can run, widest first.");
  m.def("rules", &rules, "Rule id -> its name, whether it maps rows, whether it smooths.");
  m.def("solve", &solve, "G"_a, "steps"_a, "params"_a, "mask"_a = py::none(), "state"_a = py::none(), "seed"_a = 0, "counter"_a = 0,
        "preserve_norm"_a = false, "isa"_a = py::none(),
        "Weights [..., K] and next state [..., S] of the Gramians G [..., K, K]; steps is a flat list of (rule id, number of parameters) pairs.");
  define_gpu(m);
  define_warp(m);
}
