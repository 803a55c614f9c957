// Operator schemas, the checks that memory safety needs, and the CPU registration. Messages for people come from Python.
#include <tuple>
#include <utility>

#include "chain.h"
#include "inputs.h"
#include "linear.h"
#include "torch_pool.h"

namespace mmfast {
namespace {

const CpuKernels* kernels = choose_kernels();

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

Tensor graddrop_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, std::vector<double> leak, Tensor rng) {
  const char* op = "mmfast::graddrop";
  const Inputs in(op, grads, missing, mask, 0);
  check_leaks(op, leak, in.grads().K);
  Tensor out = in.like_one();
  const auto [seed, counter] = draw_from(op, rng);
  kernels->graddrop(torch_pool(), in.grads(), {leak.data(), static_cast<int>(leak.size()), seed, counter, 0}, out.mutable_data_ptr());
  return out;
}

Tensor trimmed_mean_cpu(Tensors grads, std::vector<int64_t> missing, std::optional<Tensor> mask, int64_t trim) {
  const Inputs in("mmfast::trimmed_mean", grads, missing, mask, 0);
  STD_TORCH_CHECK(trim >= 0, "mmfast::trimmed_mean: trim must not be negative");
  Tensor out = in.like_one();
  kernels->trimmed_mean(torch_pool(), in.grads(), {nullptr, 0, 0, 0, static_cast<int>(trim < kMaxRows ? trim : kMaxRows)}, out.mutable_data_ptr());
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

// The gradients of several tensors: flat, tensor by tensor, counts[t] of tensor t, rows[] their places among K.
class Lists {
 public:
  Lists(const char* op, const Tensors& grads, const std::vector<int64_t>& counts, const std::vector<int64_t>& rows, int64_t K) {
    STD_TORCH_CHECK(K >= 1 && K <= kMaxRows && rows.size() == grads.size(), op, ": k must be from 1 to 256, rows a place for each gradient");
    copies_.reserve(grads.size());
    pointers_.reserve(grads.size());
    row_index_.reserve(grads.size());
    size_t next = 0;
    for (const int64_t count : counts) {
      STD_TORCH_CHECK(count >= 1 && count <= K && next + count <= grads.size(), op, ": counts do not fit grads");
      const Tensor& first = grads[next];
      const auto sizes = first.sizes();
      for (int64_t i = 0; i < count; ++i, ++next) {
        const Tensor& g = grads[next];
        const auto s = g.sizes();
        STD_TORCH_CHECK(device_of(g) == cpu() && dtype_of(g) == dtype_of(first) && s.size() == sizes.size() && std::equal(s.begin(), s.end(), sizes.begin()), op,
                        ": all gradients of a tensor must have one shape and dtype, on the CPU");
        STD_TORCH_CHECK(rows[next] >= 0 && rows[next] < K && (i == 0 || rows[next] > rows[next - 1]), op, ": rows must be ascending places below k");
        copies_.push_back(g.is_contiguous() ? g : torch::stable::contiguous(g));
        pointers_.push_back(copies_.back().const_data_ptr());
        row_index_.push_back(static_cast<int>(rows[next]));
      }
      Grads tensor{};
      tensor.dtype = dtype_or_throw(op, dtype_of(first));
      tensor.rows = pointers_.data() + next - count;
      tensor.k = static_cast<int>(count);
      tensor.row_index = row_index_.data() + next - count;
      tensor.K = static_cast<int>(K);
      tensor.batch = 1;
      tensor.inner = first.numel();
      tensors_.push_back(tensor);
    }
    STD_TORCH_CHECK(next == grads.size(), op, ": counts do not fit grads");
    lists = {tensors_.data(), static_cast<int64_t>(tensors_.size()), static_cast<int>(K)};
  }
  GradLists lists{};

 private:
  Tensors copies_;
  std::vector<const void*> pointers_;
  std::vector<int> row_index_;
  std::vector<Grads> tensors_;
};

Tensor gram_lists_cpu(Tensors grads, std::vector<int64_t> counts, std::vector<int64_t> rows, int64_t K) {
  const Lists in("mmfast::gram_lists", grads, counts, rows, K);
  Tensor G = empty(cpu(), {K, K}, aoti_torch_dtype_float64());
  kernels->gram_lists(torch_pool(), in.lists, static_cast<double*>(G.mutable_data_ptr()));
  return G;
}

void combine_lists_cpu(Tensors grads, std::vector<int64_t> counts, std::vector<int64_t> rows, Tensor w, Tensors out) {
  const char* op = "mmfast::combine_lists";
  const Lists in(op, grads, counts, rows, w.numel());
  STD_TORCH_CHECK(device_of(w) == cpu() && w.is_contiguous() && dtype_of(w) == aoti_torch_dtype_float64() && out.size() == counts.size(), op,
                  ": w must be a contiguous float64 tensor [K], out a tensor for each of the counts");
  std::vector<void*> to;
  size_t next = 0;
  for (size_t t = 0; t < out.size(); next += counts[t++]) {
    STD_TORCH_CHECK(device_of(out[t]) == cpu() && out[t].is_contiguous() && dtype_of(out[t]) == dtype_of(grads[next]) && out[t].numel() == grads[next].numel(), op,
                    ": out must be contiguous tensors like the gradients");
    to.push_back(out[t].mutable_data_ptr());
  }
  kernels->combine_lists(torch_pool(), in.lists, static_cast<const double*>(w.const_data_ptr()), to.data());
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
  m.def("graddrop(Tensor[] grads, int[] missing, Tensor? mask, float[] leak, Tensor(a!) rng) -> Tensor");
  m.def("trimmed_mean(Tensor[] grads, int[] missing, Tensor? mask, int trim) -> Tensor");
  m.def(
      "heads(Tensor delta, Tensor weight, Tensor head_of, Tensor? mask, int[] steps, float[] params, Tensor(a!)? state, Tensor(b!)? rng, "
      "int k, int per, bool preserve_norm) -> (Tensor, Tensor)");
  m.def("gram_lists(Tensor[] grads, int[] counts, int[] rows, int k) -> Tensor");
  m.def("combine_lists(Tensor[] grads, int[] counts, int[] rows, Tensor w, Tensor(a!)[] out) -> ()");
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
  m.impl("gram_lists", TORCH_BOX(&mmfast::gram_lists_cpu));
  m.impl("combine_lists", TORCH_BOX(&mmfast::combine_lists_cpu));
}
