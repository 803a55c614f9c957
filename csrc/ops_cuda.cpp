// The CUDA registration: what ops.cpp does, in the current stream of the gradients' device, without waiting for it.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "chain.h"
#include "cuda/kernels.h"
#include "inputs.h"
#include "linear.h"

// Lives in torch's CUDA library: weak, so that this library loads where torch has none.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();  // knows the rules

gpu::Stream current_stream(int32_t device) {
  static const auto get_stream = [] {
    if (aoti_torch_get_current_cuda_stream) return &aoti_torch_get_current_cuda_stream;
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!found) throw std::runtime_error("mmfast: this torch has no CUDA streams");
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(found);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

Device cuda_or_throw(const char* op, const Tensor& t) {
  const Device device = device_of(t);
  STD_TORCH_CHECK(device.type == aoti_torch_device_type_cuda(), op, ": all tensors must be on one device");
  return device;
}

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// The device of one call: current while this lives, with its stream.
struct Call {
  const char* op;
  Device device;
  torch::stable::accelerator::DeviceGuard guard;
  gpu::Stream stream;
  Limits limits;
  Call(const char* op, const Tensor& t) : op(op), device(cuda_or_throw(op, t)), guard(device.index), stream(current_stream(device.index)), limits(gpu::limits(device.index)) {
    const char* variable = std::getenv("MMFAST_CUDA_OVERLAP");  // tests and benchmarks
    const int overlap = gpu::forced().overlap;
    if (overlap == 1) limits.overlap = gpu::device_limits(device.index).overlap;
    else if (overlap == 0 || (variable && std::strcmp(variable, "0") == 0)) limits.overlap = false;
  }
  Tensor workspace(int64_t count) const { return empty(device, {count}, aoti_torch_dtype_float64()); }
};

void gram_into(const Call& call, const Inputs& in, double* G, int64_t stride) {
  Grads g = in.grads();
  Tensor sums = call.workspace(0);
  const void* rows[kMaxRows];
  if (g.per == Per::batch_sum) {
    const bool wide = g.dtype == Dtype::f64;
    sums = empty(call.device, {g.k, g.inner}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
    gpu::batch_sums(g, sums.mutable_data_ptr(), call.stream);
    for (int i = 0; i < g.k; ++i) rows[i] = static_cast<const char*>(sums.const_data_ptr()) + i * g.inner * (wide ? 8 : 4);
    g = {wide ? Dtype::f64 : Dtype::f32, rows, g.k, g.row_index, g.K, 1, g.inner, Per::batch, nullptr, 0};
  }
  const Tensor slots = call.workspace(gpu::plan_slots(g).workspace);
  gpu::gram(g, doubles(slots), G, stride, call.limits.overlap, call.stream);
}

void solve(const Call& call, const SolveArgs& args, int64_t* rng, bool overlap) {
  const Tensor workspace = call.workspace(gpu::solve_workspace(args));
  gpu::solve(args, rng, doubles(workspace), overlap, call.stream);
}

// What the solver says of the norm of each problem, and room for lengths that are to be measured.
struct NormSpace {
  Tensor norm, raw_w, slots;
  int64_t per_problem;
  NormSpace(const Call& call, SolveArgs& args, int64_t slots_per_problem)
      : norm(call.workspace(args.preserve_norm ? 3 * args.batch : 0)), raw_w(call.workspace(args.preserve_norm ? args.K * args.batch : 0)),
        slots(call.workspace(args.preserve_norm ? 3 * args.batch * slots_per_problem : 0)), per_problem(slots_per_problem) {
    if (args.preserve_norm) args.norm = doubles(norm), args.raw_w = doubles(raw_w);
  }
  gpu::MeasuredNorm measured(const SolveArgs& args, bool samples) const {
    return {args.norm, args.raw_w, doubles(slots), per_problem, samples ? args.w_stride : 0, args.K};
  }
};

// Which path the thread asks for, or a test by MMFAST_CUDA_PATH; else the plan decides.
std::optional<Path> forced_path() {
  if (const int path = gpu::forced().path; path >= 0) return static_cast<Path>(path);
  const char* name = std::getenv("MMFAST_CUDA_PATH");
  if (!name || !*name) return std::nullopt;
  for (int path = 0; path < kPaths; ++path)
    if (std::strcmp(name, kPathNames[path]) == 0) return static_cast<Path>(path);
  STD_TORCH_CHECK(false, "MMFAST_CUDA_PATH is ", name, ", expected two_pass, persistent, per_sample or cluster");
}

// All of resolve in one launch, or false where the plan or the device is against it.
bool resolve_fused(const Call& call, const Inputs& in, const SolveArgs& args, int64_t S, int64_t* rng, Tensor& out) {
  const std::optional<Path> forced = forced_path();
  if (forced == Path::two_pass) return false;
  Limits limits = forced ? gpu::device_limits(call.device.index) : call.limits;
  if (forced == Path::persistent) limits.cluster = 0;
  const Plan plan = gpu::plan(in.grads(), static_cast<int>(S), limits);
  bool done = false;
  if (plan.path != Path::two_pass && plan.path == forced.value_or(plan.path)) {
    const Tensor slots = call.workspace(plan.workspace);
    done = gpu::resolve_fused(in.grads(), args, rng, plan, limits, doubles(slots), out.mutable_data_ptr(), call.stream);
  }
  STD_TORCH_CHECK(done || !forced, call.op, ": the path that is forced, by MMFAST_CUDA_PATH or for this thread, is none that these gradients and rules, or this device, take");
  return done;
}

std::tuple<Tensor, Tensor> resolve_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, std::vector<int64_t> steps,
                                        std::vector<double> params, std::optional<Tensor> state, std::optional<Tensor> rng, int64_t per,
                                        bool preserve_norm, bool with_gram) {
  const char* op = "mmfast::resolve";
  const Inputs in(op, grads, missing, mask, per);
  const Call call(op, in.first());
  const int64_t K = in.grads().K;
  STD_TORCH_CHECK(with_gram || !preserve_norm, op, ": preserve_norm needs the Gramian");
  SolveArgs args{};
  args.batch = in.problems();
  args.K = static_cast<int>(K);
  args.precision = gram_precision(in.grads().dtype);
  args.preserve_norm = preserve_norm;
  const int64_t S = state_width(op, state, call.device, args.batch);
  Tensor out = in.like_one(), info = in.per_problem({K + K * K});
  set_chain(*kernels, args, op, steps, params, S);
  int64_t* stream = rng ? stream_of(op, *rng, call.device) : nullptr;
  bind_info(args, info, state, S);
  double* G = const_cast<double*>(args.G);
  with_gram = with_gram || in.grads().per == Per::batch_sum;  // there a row is missing when its batch sum is zero
  if (args.batch && with_gram && resolve_fused(call, in, args, S, stream, out)) return {out, info};
  if (args.batch && with_gram) gram_into(call, in, G, args.G_stride);
  if (args.batch && !with_gram) gpu::presence(in.grads(), G, args.G_stride, call.stream);
  const NormSpace norm(call, args, gpu::lengths_slots(in.grads()));
  solve(call, args, stream, call.limits.overlap);
  if (preserve_norm) gpu::lengths(in.grads(), args.norm, args.raw_w, K, doubles(norm.slots), call.limits.overlap, call.stream);
  gpu::combine(in.grads(), args.w, args.w_stride, with_gram, norm.measured(args, per == 1), out.mutable_data_ptr(), call.limits.overlap, call.stream);
  return {out, info};
}

Tensor gram_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t per) {
  const char* op = "mmfast::gram";
  const Inputs in(op, grads, missing, mask, per);
  const Call call(op, in.first());
  const int64_t K = in.grads().K;
  Tensor G = in.per_problem({K, K});
  gram_into(call, in, doubles(G), K * K);
  return G;
}

Tensor combine_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, Tensor w, int64_t per) {
  const char* op = "mmfast::combine";
  const Inputs in(op, grads, missing, mask, per);
  const Call call(op, in.first());
  const double* weights = in.weights_or_throw(op, w);
  Tensor out = in.like_one();
  gpu::combine(in.grads(), const_cast<double*>(weights), in.grads().K, false, {}, out.mutable_data_ptr(), false, call.stream);  // without a norm they are read only
  return out;
}

Tensor lengths_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, Tensor w, int64_t per) {
  const char* op = "mmfast::lengths";
  const Inputs in(op, grads, missing, mask, per);
  const Call call(op, in.first());
  const double* weights = in.weights_or_throw(op, w);
  const int64_t count = gpu::lengths_slots(in.grads());
  Tensor out = in.per_problem({3}), slots = call.workspace(3 * in.problems() * count);
  gpu::lengths(in.grads(), nullptr, weights, in.grads().K, doubles(slots), false, call.stream);
  gpu::fold_lengths(doubles(slots), count, in.problems(), doubles(out), call.stream);
  return out;
}

Tensor weights_cuda(Tensor gram, std::optional<Tensor> mask, std::vector<int64_t> steps, std::vector<double> params, std::optional<Tensor> state,
                    std::optional<Tensor> rng, bool preserve_norm, double precision) {
  const Call call("mmfast::weights", gram);
  SolveArgs args{};
  bind_gramians(args, call.op, gram, mask, kMaxRows);
  Tensor w = empty(call.device, gram.sizes().data(), gram.dim() - 1, aoti_torch_dtype_float64());
  args.preserve_norm = preserve_norm;
  args.precision = precision;
  const int64_t S = state_width(call.op, state, call.device, args.batch);
  set_chain(*kernels, args, call.op, steps, params, S);
  args.state = S ? doubles(*state) : nullptr;
  args.state_stride = S;
  args.w = doubles(w);
  args.w_stride = args.K;
  solve(call, args, rng ? stream_of(call.op, *rng, call.device) : nullptr, false);
  return w;
}

Tensor graddrop_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, double leak, Tensor rng) {
  const char* op = "mmfast::graddrop";
  const Inputs in(op, grads, missing, mask, 0);
  const Call call(op, in.first());
  Tensor out = in.like_one();
  gpu::graddrop(in.grads(), leak, stream_of(op, rng, call.device), out.mutable_data_ptr(), call.stream);
  return out;
}

Tensor trimmed_mean_cuda(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t trim) {
  const char* op = "mmfast::trimmed_mean";
  const Inputs in(op, grads, missing, mask, 0);
  const Call call(op, in.first());
  STD_TORCH_CHECK(trim >= 0, op, ": trim must not be negative");
  Tensor out = in.like_one();
  const int64_t K = in.grads().K;
  const Tensor present = call.workspace(K * K);
  gpu::presence(in.grads(), doubles(present), K * K, call.stream);
  gpu::trimmed_mean(in.grads(), doubles(present), static_cast<int>(trim < kMaxRows ? trim : kMaxRows), out.mutable_data_ptr(), call.stream);
  return out;
}

std::tuple<Tensor, Tensor> heads_cuda(Tensor delta, Tensor weight, Tensor head_of, std::optional<Tensor> mask, std::vector<int64_t> steps,
                                      std::vector<double> params, std::optional<Tensor> state, std::optional<Tensor> rng, int64_t K, int64_t per,
                                      bool preserve_norm) {
  const Call call("mmfast::heads", delta);
  LinearInputs in(call.op, delta, weight, head_of, mask, K, per, preserve_norm);
  const int64_t S = state_width(call.op, state, call.device, in.args.batch);
  set_chain(*kernels, in.args, call.op, steps, params, S);
  bind_info(in.args, in.info, state, S);
  const bool wide = in.heads.dtype == Dtype::f64;
  const Tensor sums = empty(call.device, {per == 2 ? in.heads.rows * in.heads.outputs : 0}, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  const NormSpace norm(call, in.args, 0);
  const gpu::HeadsPlan plan = gpu::plan_heads(in.heads, in.args, call.limits);
  const Tensor workspace = call.workspace(plan.workspace);
  // args has no mask: a branch that is hidden sends zeros, and so is missing. What head_of holds is trusted, for a look at it would wait for the device
  gpu::heads(in.heads, static_cast<const int64_t*>(head_of.const_data_ptr()), in.args, rng ? stream_of(call.op, *rng, call.device) : nullptr, plan, doubles(workspace),
             sums.mutable_data_ptr(), in.left_out(), in.right.mutable_data_ptr(), call.stream);
  return in.results();
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) {
  m.impl("gram", TORCH_BOX(&mmfast::gram_cuda));
  m.impl("combine", TORCH_BOX(&mmfast::combine_cuda));
  m.impl("lengths", TORCH_BOX(&mmfast::lengths_cuda));
  m.impl("weights", TORCH_BOX(&mmfast::weights_cuda));
  m.impl("resolve", TORCH_BOX(&mmfast::resolve_cuda));
  m.impl("graddrop", TORCH_BOX(&mmfast::graddrop_cuda));
  m.impl("trimmed_mean", TORCH_BOX(&mmfast::trimmed_mean_cuda));
  m.impl("heads", TORCH_BOX(&mmfast::heads_cuda));
}
