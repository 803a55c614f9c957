// Operator schemas, the checks that memory safety needs, and the CPU registration. Messages for people come from Python.
#include <cfloat>
#include <tuple>
#include <utility>

#include "cpu/kernels.h"
#include "gramian.h"
#include "torch_api.h"

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();

Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* ctx) {
            torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, ctx); });
          }};
}

Dtype dtype_or_throw(const char* op, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::f16;
  STD_TORCH_CHECK(false, op, ": grads must be float16, bfloat16, float32 or float64");
}

// The gradients of one call: checked, contiguous, with their places among K rows.
class Inputs {
 public:
  Inputs(const char* op, const Tensors& grads, const std::vector<int64_t>& missing, const std::optional<Tensor>& mask, int64_t per) {
    const int64_t k = static_cast<int64_t>(grads.size()), K = k + static_cast<int64_t>(missing.size());
    STD_TORCH_CHECK(k >= 1 && K <= kMaxRows, op, ": from 1 to 256 gradients are needed");
    STD_TORCH_CHECK(per >= 0 && per <= 2, op, ": per must be 0, 1 or 2");
    first_ = &grads[0];
    const auto sizes = first_->sizes();
    const int32_t dtype = dtype_of(*first_);
    kept_.reserve(k);
    for (int64_t i = 0; i < k; ++i) {
      const Tensor& g = grads[i];
      const auto s = g.sizes();
      STD_TORCH_CHECK(is_cpu(g) && dtype_of(g) == dtype && s.size() == sizes.size() && std::equal(s.begin(), s.end(), sizes.begin()), op,
                      ": all gradients must have one shape, dtype and device");
      if (g.is_contiguous()) {
        rows_[i] = g.const_data_ptr();
      } else {
        kept_.push_back(torch::stable::contiguous(g));
        rows_[i] = kept_.back().const_data_ptr();
      }
    }
    size_t next = 0;
    for (int64_t place = 0, i = 0; place < K; ++place) {
      if (next < missing.size() && missing[next] == place) {
        ++next;
      } else {
        STD_TORCH_CHECK(i < k, op, ": missing must be ascending places below K");
        places_[i++] = static_cast<int>(place);
      }
    }
    STD_TORCH_CHECK(next == missing.size(), op, ": missing must be ascending places below K");
    grads_.dtype = dtype_or_throw(op, dtype);
    grads_.rows = rows_;
    grads_.k = static_cast<int>(k);
    grads_.places = places_;
    grads_.K = static_cast<int>(K);
    STD_TORCH_CHECK(per == 0 || sizes.size() >= 1, op, ": per sample needs a leading batch dimension");
    const int64_t numel = first_->numel();
    grads_.batch = sizes.size() ? sizes[0] : 1;
    grads_.inner = grads_.batch ? numel / grads_.batch : 0;
    grads_.per = static_cast<Per>(per);
    grads_.mask = nullptr;
    grads_.mask_stride = 0;
    if (mask) {
      mask_ = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
      const auto m = mask->sizes();
      const bool per_sample = m.size() == 2;
      STD_TORCH_CHECK(is_cpu(*mask) && dtype_of(*mask) == aoti_torch_dtype_bool() && (m.size() == 1 || per_sample) && m[m.size() - 1] == K &&
                          (!per_sample || (sizes.size() && m[0] == sizes[0])),
                      op, ": mask must be a bool tensor [K] or [B, K]");
      grads_.mask = static_cast<const bool*>(mask_->const_data_ptr());
      grads_.mask_stride = per_sample ? K : 0;
    }
  }
  const Grads& grads() const { return grads_; }
  const Tensor& first() const { return *first_; }
  // Problems to solve: one, or one per sample.
  int64_t problems() const { return grads_.per == Per::sample ? grads_.batch : 1; }
  Tensor like_one() const { return empty_cpu(first_->sizes().data(), static_cast<int64_t>(first_->sizes().size()), dtype_of(*first_)); }

 private:
  Grads grads_{};
  const Tensor* first_;
  Tensors kept_;
  std::optional<Tensor> mask_;
  const void* rows_[kMaxRows];
  int places_[kMaxRows];
};

// Values of state per problem.
int64_t state_width(const char* op, const std::optional<Tensor>& state, int64_t problems) {
  if (!state) return 0;
  const auto sizes = state->sizes();
  STD_TORCH_CHECK(is_cpu(*state) && state->is_contiguous() && dtype_of(*state) == aoti_torch_dtype_float64() && sizes.size() >= 1 &&
                      state->numel() == problems * sizes[sizes.size() - 1],
                  op, ": state must be a contiguous float64 tensor [..., S], S values for each problem");
  return sizes[sizes.size() - 1];
}

// The (seed, counter) of a random stream, which moves on by one call.
std::pair<uint64_t, uint32_t> draw_from(const char* op, const Tensor& rng) {
  STD_TORCH_CHECK(is_cpu(rng) && dtype_of(rng) == aoti_torch_dtype_int64() && rng.numel() == 2 && rng.is_contiguous(), op,
                  ": rng must be an int64 tensor (seed, counter)");
  int64_t* r = static_cast<int64_t*>(rng.mutable_data_ptr());
  return {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[1]++)};
}

// The last thing that can fail before results are written: it moves the random stream on.
void set_chain(SolveArgs& args, const char* op, const std::vector<int64_t>& steps, const std::vector<double>& params, int64_t state_size,
               const std::optional<Tensor>& rng) {
  STD_TORCH_CHECK(steps.size() % 2 == 0 && !steps.empty(), op, ": steps must be pairs of rule and number of parameters");
  int64_t total = 0;
  for (size_t s = 1; s < steps.size(); s += 2) total += steps[s];
  STD_TORCH_CHECK(total == static_cast<int64_t>(params.size()), op, ": params do not fit steps");
  args.steps = steps.data();
  args.n_steps = static_cast<int>(steps.size() / 2);
  args.params = params.data();
  STD_TORCH_CHECK(kernels->accepts(args), op, ": steps name an unknown rule, or params do not fit it");
  const int64_t needed = kernels->state_size(args);
  STD_TORCH_CHECK(needed == state_size, op, ": the rules keep ", needed, " values of state, got ", state_size);
  if (rng) std::tie(args.seed, args.counter) = draw_from(op, *rng);
}

// The solver writes weights [K] and Gramian [K, K] of each problem into info, and keeps its S numbers of state.
void bind_info(SolveArgs& args, Tensor& info, std::optional<Tensor>& state, int64_t S) {
  args.w = static_cast<double*>(info.mutable_data_ptr());
  args.G = args.w + args.K;
  args.w_stride = args.G_stride = args.K + args.K * args.K;
  args.state = S ? static_cast<double*>(state->mutable_data_ptr()) : nullptr;
  args.state_stride = S;
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
  const int64_t S = state_width(op, state, problems), width = K + K * K;
  args.precision = in.grads().dtype == Dtype::f64 ? DBL_EPSILON : FLT_EPSILON;
  STD_TORCH_CHECK(with_gram || !preserve_norm, op, ": preserve_norm needs the Gramian");
  args.preserve_norm = preserve_norm;
  Tensor out = in.like_one();
  Tensor info = per == 1 ? empty_cpu({problems, width}, aoti_torch_dtype_float64()) : empty_cpu({width}, aoti_torch_dtype_float64());
  set_chain(args, op, steps, params, S, rng);
  if (problems == 0) return {out, info};
  bind_info(args, info, state, S);
  kernels->resolve(torch_pool(), in.grads(), args, with_gram, out.mutable_data_ptr());
  return {out, info};
}

Tensor gram_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t per) {
  const Inputs in("mmfast::gram", grads, missing, mask, per);
  const int64_t K = in.grads().K;
  Tensor G = per == 1 ? empty_cpu({in.problems(), K, K}, aoti_torch_dtype_float64()) : empty_cpu({K, K}, aoti_torch_dtype_float64());
  kernels->gram(torch_pool(), in.grads(), static_cast<double*>(G.mutable_data_ptr()));
  return G;
}

Tensor combine_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, Tensor w, int64_t per) {
  const char* op = "mmfast::combine";
  const Inputs in(op, grads, missing, mask, per);
  STD_TORCH_CHECK(is_cpu(w) && w.is_contiguous() && dtype_of(w) == aoti_torch_dtype_float64() && w.numel() == in.problems() * in.grads().K, op,
                  ": w must be a contiguous float64 tensor [K], or [B, K] per sample");
  Tensor out = in.like_one();
  kernels->combine(torch_pool(), in.grads(), static_cast<const double*>(w.const_data_ptr()), out.mutable_data_ptr());
  return out;
}

// [..., K, K] float64 -> [..., K] float64; state and rng advance in place.
Tensor weights_cpu(Tensor gram, std::optional<Tensor> mask, std::vector<int64_t> steps, std::vector<double> params,
                                       std::optional<Tensor> state, std::optional<Tensor> rng, bool preserve_norm, double precision) {
  const char* op = "mmfast::weights";
  const auto sizes = gram.sizes();
  const int64_t dim = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(dim >= 2 && dim < 64 && sizes[dim - 1] == sizes[dim - 2] && sizes[dim - 1] >= 1 && sizes[dim - 1] <= kMaxRows && is_cpu(gram) &&
                      gram.is_contiguous() && dtype_of(gram) == aoti_torch_dtype_float64(),
                  op, ": gram must be a contiguous float64 tensor [..., K, K] with K from 1 to 256");
  const int64_t K = sizes[dim - 1], batch = gram.numel() / (K * K);
  STD_TORCH_CHECK(!mask || (is_cpu(*mask) && mask->is_contiguous() && dtype_of(*mask) == aoti_torch_dtype_bool() &&
                            (mask->numel() == K || mask->numel() == batch * K)),
                  op, ": mask must be a contiguous bool tensor [K] or [..., K]");
  Tensor w = empty_cpu(sizes.data(), dim - 1, aoti_torch_dtype_float64());
  SolveArgs args{};
  args.batch = batch;
  args.K = static_cast<int>(K);
  args.G = static_cast<const double*>(gram.const_data_ptr());
  args.G_stride = K * K;
  args.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  args.mask_stride = mask && mask->numel() == batch * K ? K : 0;
  args.preserve_norm = preserve_norm;
  args.precision = precision;
  const int64_t S = state_width(op, state, batch);
  set_chain(args, op, steps, params, S, rng);
  if (batch == 0) return w;
  args.state = S ? static_cast<double*>(state->mutable_data_ptr()) : nullptr;
  args.state_stride = S;
  args.w = static_cast<double*>(w.mutable_data_ptr());
  args.w_stride = K;
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
  const int64_t dim = delta.dim(), O = dim ? delta.size(dim - 1) : 0;
  STD_TORCH_CHECK(K >= 1 && K <= kMaxRows, op, ": k must be from 1 to 256");
  STD_TORCH_CHECK(per >= 0 && per <= 2, op, ": per must be 0, 1 or 2");
  STD_TORCH_CHECK(dim >= (per ? 2 : 1) && dim < 64 && weight.dim() == 2 && weight.size(0) == O, op,
                  ": delta must be [..., O], with a leading batch dimension for per = 1 and 2, and weight [O, H]");
  STD_TORCH_CHECK(is_cpu(delta) && is_cpu(weight) && dtype_of(delta) == dtype_of(weight), op, ": delta and weight must have one dtype and device");
  STD_TORCH_CHECK(is_cpu(head_of) && dtype_of(head_of) == aoti_torch_dtype_int64() && head_of.is_contiguous() && head_of.numel() == O, op,
                  ": head_of must be a contiguous int64 tensor [O]");
  int64_t sizes[kMaxRows] = {}, head = 0;
  for (int64_t o = 0; o < O; ++o) {
    const int64_t next = static_cast<const int64_t*>(head_of.const_data_ptr())[o];
    STD_TORCH_CHECK(next >= 0 && next < K && (next == head || (next == head + 1 && sizes[head])), op, ": head_of must name all of k branches in order");
    ++sizes[head = next];
  }
  STD_TORCH_CHECK(head == K - 1 && sizes[head], op, ": head_of must name all of k branches in order");
  delta = torch::stable::contiguous(delta);
  weight = torch::stable::contiguous(weight);
  const Dtype dtype = dtype_or_throw(op, dtype_of(delta));
  const bool half = dtype == Dtype::f16;
  const int32_t product = half ? aoti_torch_dtype_float32() : dtype_of(delta);
  const int64_t batch = dim > 1 ? delta.size(0) : 1, problems = per == 1 ? batch : 1, width = K + K * K, H = weight.size(1);
  Heads h{dtype, delta.const_data_ptr(), weight.const_data_ptr(), batch, batch ? delta.numel() / (batch * O) : 0, O, H, sizes, static_cast<int>(K),
          static_cast<Per>(per), nullptr, 0};
  SolveArgs args{};
  args.batch = problems;
  args.K = h.K;
  args.preserve_norm = preserve_norm;
  args.precision = dtype == Dtype::f64 ? DBL_EPSILON : FLT_EPSILON;
  bool any[kMaxRows] = {};  // the rows that a mask leaves in somewhere
  if (mask) {
    mask = torch::stable::contiguous(*mask);
    const bool shared = mask->dim() == 1;
    STD_TORCH_CHECK(is_cpu(*mask) && dtype_of(*mask) == aoti_torch_dtype_bool() &&
                        (shared ? mask->numel() == K : mask->dim() == 2 && dim > 1 && mask->size(0) == batch && mask->size(1) == K),
                    op, ": mask must be a bool tensor [K] or [B, K]");
    h.mask = args.mask = static_cast<const bool*>(mask->const_data_ptr());
    h.mask_stride = args.mask_stride = shared ? 0 : K;
    if (!shared && per != 1) {
      for (int64_t e = 0; e < batch * K; ++e) any[e % K] |= h.mask[e];
      args.mask = any;
      args.mask_stride = 0;
    }
  }
  const int64_t S = state_width(op, state, problems);
  Tensor left = delta, right = empty_cpu({O, H}, product);
  const bool copies = per == 1 || mask || half;
  if (copies) left = empty_cpu(delta.sizes().data(), dim, product);
  Tensor info = per == 1 ? empty_cpu({problems, width}, aoti_torch_dtype_float64()) : empty_cpu({width}, aoti_torch_dtype_float64());
  set_chain(args, op, steps, params, S, rng);
  bind_info(args, info, state, S);
  kernels->heads(torch_pool(), h, args, copies ? left.mutable_data_ptr() : nullptr, right.mutable_data_ptr());
  Tensor out = torch::stable::matmul(left, right);
  return {half ? torch::stable::to(out, ScalarType::Half) : out, info};
}

}  // namespace
}  // namespace mmfast

STABLE_TORCH_LIBRARY(mmfast, m) {
  m.def("gram(Tensor[] grads, int[] missing, Tensor? mask, int per) -> Tensor");
  m.def("combine(Tensor[] grads, int[] missing, Tensor? mask, Tensor w, int per) -> Tensor");
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
  m.impl("weights", TORCH_BOX(&mmfast::weights_cpu));
  m.impl("resolve", TORCH_BOX(&mmfast::resolve_cpu));
  m.impl("graddrop", TORCH_BOX(&mmfast::graddrop_cpu));
  m.impl("trimmed_mean", TORCH_BOX(&mmfast::trimmed_mean_cpu));
  m.impl("heads", TORCH_BOX(&mmfast::heads_cpu));
}
