// Operator schemas, the checks that memory safety needs, and the CPU registration. Messages for people come from Python.
#include <tuple>
#include <utility>

#include "chain.h"
#include "inputs.h"
#include "linear.h"

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();

Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, ctx); });
          }};
}

// The (seed, counter) of a random stream, which moves on by one call.
std::pair<uint64_t, uint32_t> draw_from(const char* op, const Tensor& rng) {
  int64_t* r = stream_of(op, rng, cpu());
  return {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[1]++)};
}

// set_chain(), and then the last thing that can fail before results are written: it moves the random stream on.
void set_chain(SolveArgs& args, const char* op, const std::vector<int64_t>& steps, const std::vector<double>& params, int64_t state_size,
               const std::optional<Tensor>& rng) {
  set_chain(*kernels, args, op, steps, params, state_size);
  if (rng) std::tie(args.seed, args.counter) = draw_from(op, *rng);
}

// (result, weights and K x K Gramian of each problem); state and rng advance in place.
std::tuple<Tensor, Tensor> resolve_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, std::vector<int64_t> steps,
                                       std::vector<double> params, std::optional<Tensor> state, std::optional<Tensor> rng, int64_t per,
                                       bool preserve_norm, bool with_gram) {
  const char* op = "mmfast::resolve";
  const Inputs in(op, grads, missing, mask, per);
  const int64_t K = in.grads().K, problems = in.problems();
  SolveArgs args{};
  args.batch = problems;
  args.K = static_cast<int>(K);
  const int64_t S = state_width(op, state, cpu(), problems);
  args.precision = gram_precision(in.grads().dtype);
  STD_TORCH_CHECK(with_gram || !preserve_norm, op, ": preserve_norm needs the Gramian");
  args.preserve_norm = preserve_norm;
  Tensor out = in.like_one(), info = in.per_problem({K + K * K});
  set_chain(args, op, steps, params, S, rng);
  if (problems == 0) return {out, info};
  bind_info(args, info, state, S);
  kernels->resolve(torch_pool(), in.grads(), args, with_gram, out.mutable_data_ptr());
  return {out, info};
}

Tensor gram_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t per) {
  const Inputs in("mmfast::gram", grads, missing, mask, per);
  const int64_t K = in.grads().K;
  Tensor G = in.per_problem({K, K});
  kernels->gram(torch_pool(), in.grads(), static_cast<double*>(G.mutable_data_ptr()));
  return G;
}

Tensor combine_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, Tensor w, int64_t per) {
  const char* op = "mmfast::combine";
  const Inputs in(op, grads, missing, mask, per);
  const double* weights = in.weights_or_throw(op, w);
  Tensor out = in.like_one();
  kernels->combine(torch_pool(), in.grads(), weights, out.mutable_data_ptr());
  return out;
}

// Squared lengths of the plain sum, its product with the weighted sum, and of that: [3], or [B, 3] per sample.
Tensor lengths_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, Tensor w, int64_t per) {
  const char* op = "mmfast::lengths";
  const Inputs in(op, grads, missing, mask, per);
  const double* weights = in.weights_or_throw(op, w);
  Tensor out = in.per_problem({3});
  kernels->lengths(torch_pool(), in.grads(), weights, static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

// [..., K, K] float64 -> [..., K] float64; state and rng advance in place.
Tensor weights_cpu(Tensor gram, std::optional<Tensor> mask, std::vector<int64_t> steps, std::vector<double> params,
                                       std::optional<Tensor> state, std::optional<Tensor> rng, bool preserve_norm, double precision) {
  const char* op = "mmfast::weights";
  SolveArgs args{};
  bind_gramians(args, op, gram, mask, kMaxSolved);
  Tensor w = empty(cpu(), gram.sizes().data(), gram.dim() - 1, aoti_torch_dtype_float64());
  args.preserve_norm = preserve_norm;
  args.precision = precision;
  const int64_t S = state_width(op, state, cpu(), args.batch);
  set_chain(args, op, steps, params, S, rng);
  if (args.batch == 0) return w;
  args.state = S ? static_cast<double*>(state->mutable_data_ptr()) : nullptr;
  args.state_stride = S;
  args.w = static_cast<double*>(w.mutable_data_ptr());
  args.w_stride = args.K;
  kernels->solve(torch_pool(), args);
  return w;
}

Tensor graddrop_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, double leak, Tensor rng) {
  const char* op = "mmfast::graddrop";
  const Inputs in(op, grads, missing, mask, 0);
  Tensor out = in.like_one();
  const auto [seed, counter] = draw_from(op, rng);
  kernels->graddrop(torch_pool(), in.grads(), {leak, seed, counter, 0}, out.mutable_data_ptr());
  return out;
}

Tensor trimmed_mean_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t trim) {
  const Inputs in("mmfast::trimmed_mean", grads, missing, mask, 0);
  STD_TORCH_CHECK(trim >= 0, "mmfast::trimmed_mean: trim must not be negative");
  Tensor out = in.like_one();
  kernels->trimmed_mean(torch_pool(), in.grads(), {0.0, 0, 0, static_cast<int>(trim < kMaxRows ? trim : kMaxRows)}, out.mutable_data_ptr());
  return out;
}

// Linear branches: (resolved gradient [..., H] of their input, weights and K x K Gramian of each problem); state and rng advance in place.
std::tuple<Tensor, Tensor> heads_cpu(Tensor delta, Tensor weight, Tensor head_of, std::optional<Tensor> mask, std::vector<int64_t> steps,
                                     std::vector<double> params, std::optional<Tensor> state, std::optional<Tensor> rng, int64_t K, int64_t per,
                                     bool preserve_norm) {
  const char* op = "mmfast::heads";
  LinearInputs in(op, delta, weight, head_of, mask, K, per, preserve_norm);
  STD_TORCH_CHECK(in.device == cpu(), op, ": all tensors must be on one device");
  int64_t sizes[kMaxRows] = {};
  const auto* heads = static_cast<const int64_t*>(head_of.const_data_ptr());
  STD_TORCH_CHECK(branch_sizes(heads, in.heads.outputs, K, sizes), op, ": head_of must name all of k branches in order");
  in.heads.sizes = sizes;
  SolveArgs& args = in.args;
  args.mask = in.heads.mask;
  args.mask_stride = in.heads.mask_stride;
  bool any[kMaxRows] = {};  // the rows that a mask leaves in somewhere
  if (args.mask_stride && per != 1) {
    for (int64_t e = 0; e < in.heads.batch * K; ++e) any[e % K] |= args.mask[e];
    args.mask = any;
    args.mask_stride = 0;
  }
  const int64_t S = state_width(op, state, cpu(), args.batch);
  set_chain(args, op, steps, params, S, rng);
  bind_info(args, in.info, state, S);
  kernels->heads(torch_pool(), in.heads, args, in.left_out(), in.right.mutable_data_ptr());
  return in.results();
}

}  // namespace
}  // namespace mmfast

extern "C" __attribute__((visibility("default"))) const mmfast::CpuEntry* mmfast_cpu_entry() {
  static const mmfast::CpuEntry entry{mmfast::kernels, mmfast::torch_pool};
  return &entry;
}

STABLE_TORCH_LIBRARY(mmfast, m) {
  m.def("gram(Tensor[] grads, int[] missing, Tensor? mask, int per) -> Tensor");
  m.def("combine(Tensor[] grads, int[] missing, Tensor? mask, Tensor w, int per) -> Tensor");
  m.def("lengths(Tensor[] grads, int[] missing, Tensor? mask, Tensor w, int per) -> Tensor");
  m.def(
      "weights(Tensor gram, Tensor? mask, int[] steps, float[] params, Tensor(a!)? state, Tensor(b!)? rng, bool preserve_norm, "
      "float precision) -> Tensor");
  m.def(
      "resolve(Tensor[] grads, int[] missing, Tensor? mask, int[] steps, float[] params, Tensor(a!)? state, Tensor(b!)? rng, int per, "
      "bool preserve_norm, bool with_gram) -> (Tensor, Tensor)");
  m.def("graddrop(Tensor[] grads, int[] missing, Tensor? mask, float leak, Tensor(a!) rng) -> Tensor");
  m.def("trimmed_mean(Tensor[] grads, int[] missing, Tensor? mask, int trim) -> Tensor");
  m.def(
      "heads(Tensor delta, Tensor weight, Tensor head_of, Tensor? mask, int[] steps, float[] params, Tensor(a!)? state, Tensor(b!)? rng, "
      "int k, int per, bool preserve_norm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  m.impl("gram", TORCH_BOX(&mmfast::gram_cpu));
  m.impl("combine", TORCH_BOX(&mmfast::combine_cpu));
  m.impl("lengths", TORCH_BOX(&mmfast::lengths_cpu));
  m.impl("weights", TORCH_BOX(&mmfast::weights_cpu));
  m.impl("resolve", TORCH_BOX(&mmfast::resolve_cpu));
  m.impl("graddrop", TORCH_BOX(&mmfast::graddrop_cpu));
  m.impl("trimmed_mean", TORCH_BOX(&mmfast::trimmed_mean_cpu));
  m.impl("heads", TORCH_BOX(&mmfast::heads_cpu));
}
