// The GPU's kernels on the CPU, thread by thread (cuda/exec.h): what they compute is tested where there is no GPU.
#include "host.h"

#define MMFAST_ISA host_gpu
#include "cuda/architectures.h"
#include "cuda/combine.h"
#include "cuda/gram.h"
#include "cuda/heads.h"
#include "cuda/plan.h"
#include "cuda/tiles.h"

// float16 arrays, as the kernels take them.
template <>
struct pybind11::detail::npy_format_descriptor<mmfast::host_gpu::Half> {
  static constexpr auto name = const_name("numpy.float16");
  static pybind11::dtype dtype() { return pybind11::dtype("e"); }
};

namespace mmfast {
namespace {

// The rows [batch, inner] of one call, and how they are summed.
template <class T>
struct Inputs {
  host_gpu::Rows rows{};
  host_gpu::Units units{};
  int64_t batch, inner;
  bool samples;  // a problem each, or masked each on their own

  Inputs(const std::vector<Array<T>>& grads, const std::optional<Bools>& mask, bool per_sample) {
    const int k = static_cast<int>(grads.size());
    if (k < 1 || k > kMaxRows) throw py::value_error("grads must hold 1 to 256 arrays");
    for (int i = 0; i < k; ++i) {
      if (grads[i].ndim() != 2 || grads[i].shape(0) != grads[0].shape(0) || grads[i].shape(1) != grads[0].shape(1))
        throw py::value_error("grads must be arrays [batch, inner] of one shape");
      rows.ptr[i] = grads[i].data();
      rows.row_index[i] = static_cast<int16_t>(i);
    }
    batch = grads[0].shape(0), inner = grads[0].shape(1);
    rows.k = k;
    const bool per_sample_mask = mask && mask->ndim() == 2;
    if (mask && mask->size() != (per_sample_mask ? batch * k : k)) throw py::value_error("mask must have shape [K] or [batch, K]");
    rows.mask = mask ? mask->data() : nullptr;
    rows.mask_stride = per_sample_mask ? k : 0;
    samples = per_sample || per_sample_mask;
    units = samples ? host_gpu::sample_units(batch, inner, per_sample) : host_gpu::whole_units(batch * inner);
  }
};

template <class T>
py::array_t<double> gram(const std::vector<Array<T>>& grads, const std::optional<Bools>& mask, bool per_sample) {
  const Inputs<T> in(grads, mask, per_sample);
  const int k = in.rows.k;
  const int64_t slots = in.units.slots(), pairs = pair_count(k), problems = per_sample ? in.batch : 1;
  std::vector<double> sums(static_cast<size_t>(slots * pairs), NAN);  // what no tile writes shows
  std::vector<host_gpu::Acc<T>> shared(host_gpu::reduce_shared_size<T>());
  host_gpu::for_tile_shapes(k, [&](auto rows, auto columns, int tiles) {
    constexpr int R = decltype(rows)::value, C = decltype(columns)::value;
    for (int tile = 0; tile < tiles; ++tile)
      for (int64_t s = 0; s < slots; ++s) {
        const host_gpu::TileOrigin origin = host_gpu::tile_origin<R, C>(k, tile);
        host_gpu::gram_slot<T, R, C>(host_gpu::Block{}, in.rows, in.units, s, origin.row, origin.column, shared.data(), sums.data() + s * pairs);
      }
  });
  py::array_t<double> G({problems, static_cast<int64_t>(k), static_cast<int64_t>(k)});
  const int64_t problem_slots = per_sample ? 1 : slots;
  for (int64_t b = 0; b < problems; ++b)
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j) {
        const bool* problem_mask = in.rows.mask && (per_sample || in.rows.mask_stride == 0) ? in.rows.mask + b * in.rows.mask_stride : nullptr;
        G.mutable_at(b, i, j) = host_gpu::fold_slots(sums.data() + b * problem_slots * pairs, problem_slots, pairs, k, i, j, problem_mask && !(problem_mask[i] && problem_mask[j]));
      }
  return G;
}

template <class T>
Array<T> combine(const std::vector<Array<T>>& grads, const Doubles& w,
                 const std::optional<Bools>& mask, bool per_sample, bool skip) {
  const Inputs<T> in(grads, mask, per_sample);
  if (w.size() != (per_sample ? in.batch : 1) * in.rows.k) throw py::value_error("w must have shape [K], or [batch, K] per sample");
  Array<T> out({in.batch, in.inner});
  const int64_t segments = in.samples ? in.batch : 1, size = in.samples ? in.inner : in.batch * in.inner;
  for (int64_t s = 0; s < segments; ++s) {
    const double* segment_w = w.data() + (per_sample ? s * in.rows.k : 0);
    std::vector<const T*> ptr;
    std::vector<host_gpu::Acc<T>> weight;
    for (int i = 0; i < in.rows.k; ++i)
      if (host_gpu::is_active(in.rows, i, segment_w, in.rows.mask ? in.rows.mask + s * in.rows.mask_stride : nullptr, skip)) {
        ptr.push_back(static_cast<const T*>(in.rows.ptr[i]) + s * size);
        weight.push_back(static_cast<host_gpu::Acc<T>>(segment_w[i]));
      }
    T* to = out.mutable_data() + s * size;
    for (int64_t t = 0; t < size; ++t) {
      host_gpu::Acc<T> sum;
      host_gpu::weighted_sum<T, 1>(ptr.data(), weight.data(), static_cast<int>(ptr.size()), t, 1, &sum);
      host_gpu::store_acc(to + t, sum);
    }
  }
  return out;
}

// Gramians [1 or batch, K, K] of linear branches, from delta [batch, rows, outputs] and W [outputs, inputs].
template <class T>
py::array_t<double> heads(const Array<T>& delta, const Array<T>& weight, const std::vector<int64_t>& head_of, bool per_sample, double precision) {
  if (delta.ndim() != 3 || weight.ndim() != 2 || weight.shape(0) != delta.shape(2) || static_cast<int64_t>(head_of.size()) != delta.shape(2) || head_of.empty())
    throw py::value_error("delta must be [batch, rows, outputs], weight [outputs, inputs], head_of [outputs]");
  const int64_t batch = delta.shape(0), rows = delta.shape(1), O = delta.shape(2), H = weight.shape(1), problems = per_sample ? batch : 1;
  const int K = static_cast<int>(head_of.back()) + 1;
  const Dtype type = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  host_gpu::Branches h{head_of.data(), O, K, {type, delta.data(), per_sample ? rows : batch * rows, O, O, 1}, {type, weight.data(), H, O, 1, H}, nullptr, nullptr};
  auto multiply = [&](const host_gpu::MatrixView& x) {
    std::vector<double> slots(static_cast<size_t>(x.slots() * O * O), NAN);  // what no tile writes shows
    std::vector<T> shared(host_gpu::product_shared_size<T>(), T(NAN));
    for (int64_t s = 0; s < x.slots(); ++s)
      for (int64_t i = 0; i < x.tiles(); ++i)
        for (int64_t j = i; j < x.tiles(); ++j) host_gpu::product_tile<T>(host_gpu::Block{}, x, s, i, j, shared.data(), slots.data() + s * O * O);
    return slots;
  };
  const std::vector<double> weight_products = multiply(h.weight), delta_products = per_sample ? std::vector<double>() : multiply(h.delta);
  h.weight_products = weight_products.data(), h.delta_products = delta_products.data();
  std::vector<int> begin(static_cast<size_t>(K) + 1);
  host_gpu::find_branches(h, 0, 1, begin.data());
  py::array_t<double> G({problems, static_cast<int64_t>(K), static_cast<int64_t>(K)});
  constexpr int64_t threads = 3;  // that share out the partial sums
  for (int64_t b = 0; b < problems; ++b) {
    std::vector<double> memory(static_cast<size_t>(host_gpu::BranchPartials::size(K, O)), NAN);
    const host_gpu::BranchPartials partials{memory.data(), O, K};
    for (int64_t t = 0; t < threads; ++t) {
      if (per_sample) {
        const T* sample = delta.data() + b * rows * O;
        host_gpu::store_partials(h, begin.data(), [&](int64_t i, int64_t j) { return host_gpu::column_product(h.delta, sample, i, j); }, t, threads, partials);
      } else {
        host_gpu::store_partials(h, begin.data(), [&](int64_t i, int64_t j) { return host_gpu::fold_products(h.delta, h.delta_products, i, j); }, t, threads, partials);
      }
    }
    for (int64_t t = 0; t < threads; ++t) host_gpu::store_gramian(begin.data(), precision, partials, t, threads, G.mutable_data(b, 0, 0));
  }
  return G;
}

py::dict dict_of(const Plan& p) {
  using namespace py::literals;
  return py::dict("path"_a = kPathNames[static_cast<int>(p.path)], "blocks"_a = p.blocks, "staged_steps"_a = p.staged_steps, "shared"_a = p.shared, "workspace"_a = p.workspace,
                  "read"_a = p.read, "written"_a = p.written, "launches"_a = p.launches);
}

Limits limits_of(const py::kwargs& given) {
  Limits limits{};
  for (const auto& [name, value] : given) {
    const std::string field = py::cast<std::string>(name);
    if (field == "processors") limits.processors = py::cast<int64_t>(value);
    else if (field == "shared_block") limits.shared_block = py::cast<int64_t>(value);
    else if (field == "shared_processor") limits.shared_processor = py::cast<int64_t>(value);
    else if (field == "cooperative") limits.cooperative = py::cast<bool>(value);
    else if (field == "cluster") limits.cluster = py::cast<int64_t>(value);
    else if (field == "persistent") limits.persistent = py::cast<bool>(value);
    else if (field == "per_sample") limits.per_sample = py::cast<bool>(value);
    else if (field == "cluster_bytes") limits.cluster_bytes = py::cast<int64_t>(value);
    else if (field == "share_kept") limits.share_kept = py::cast<double>(value);
    else throw py::value_error("there is no limit " + field);
  }
  return limits;
}

py::dict plan_of_samples(int64_t k, int64_t batch, int64_t inner, int64_t size, int64_t fixed, const py::kwargs& limits) {
  return dict_of(plan_samples(k, batch, inner, size, fixed, limits_of(limits)));
}

py::dict plan(int64_t k, int64_t n, int64_t size, int64_t fixed, bool one_problem, const py::kwargs& limits) {
  return dict_of(plan_resolve(k, n, size, fixed, one_problem, limits_of(limits)));
}

template <class T>
void define(py::module_& m) {
  using namespace py::literals;
  m.def("gpu_gram", &gram<T>, "grads"_a, "mask"_a = py::none(), "per_sample"_a = false,
        "Gramians [1 or batch, K, K] of arrays [batch, inner] as the CUDA kernels sum them.");
  m.def("gpu_combine", &combine<T>, "grads"_a, "w"_a, "mask"_a = py::none(), "per_sample"_a = false, "skip"_a = false,
        "The weighted sum of arrays [batch, inner] as the CUDA kernels form it.");
}

template <class T>
void define_heads(py::module_& m) {
  using namespace py::literals;
  m.def("gpu_heads", &heads<T>, "delta"_a, "weight"_a, "head_of"_a, "per_sample"_a, "precision"_a,
        "Gramians [1 or batch, K, K] of linear branches as the CUDA kernels form them.");
}

}  // namespace

void define_gpu(py::module_& m) {
  using namespace py::literals;
  m.def("gpu_plan", &plan, "k"_a, "n"_a, "size"_a, "fixed"_a, "one_problem"_a,
        "Which CUDA kernels resolve k gradients of n elements of `size` bytes on a device of the limits that follow (plan.h).");
  m.def("gpu_plan_samples", &plan_of_samples, "k"_a, "batch"_a, "inner"_a, "size"_a, "fixed"_a, "The same for a problem per sample.");
  m.def("gpu_solver_warps", &solver_warps, "batch"_a, "scratch"_a, "Warps that solve problems at once, each in so many doubles of scratch (plan.h).");
  m.def("gpu_code", [](const char* list, int major, int minor) { return static_cast<int>(code_for(list, major, minor)); }, "list"_a, "major"_a, "minor"_a,
        "0 for no code, 1 for machine code, 2 for PTX that a library compiled for `list` has for a device (architectures.h).");
  define<float>(m);
  define<double>(m);
  define<host_gpu::Half>(m);
  define_heads<float>(m);
  define_heads<double>(m);
}

}  // namespace mmfast
