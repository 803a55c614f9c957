// Runs the CPU operators of every instruction set that the processor has on the same numbers and prints a hash of what each gives; arm64.py compares
// an x86 processor's with those of an ARM one. The rules come from standard input, as races.py writes them.
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "numbers.h"

using namespace mmfast;
using portable::Bfloat;
using portable::Half;

namespace {

const Pool kOneThread{1, [](int64_t n, int64_t, void (*body)(int64_t, int64_t, void*), void* ctx) { body(0, n, ctx); }};
const char* const kDtypes[] = {"float16", "bfloat16", "float32", "float64"};

struct Rule {
  std::string name;
  std::vector<int64_t> steps;
  std::vector<double> params;
  int K;
};

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

// FNV-1a over the bits of numbers. What sign and payload a NaN has is the processor's choice: all of them count as one.
class Hash {
 public:
  template <class T>
  void add(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const auto value = portable::load_acc(x + i);
      uint64_t bits = 0;
      if (value == value) std::memcpy(&bits, x + i, sizeof(T));
      else bits = 0x7ff8;
      for (int byte = 0; byte < 8; ++byte, bits >>= 8) hash_ = (hash_ ^ (bits & 255)) * 0x100000001b3;
    }
  }
  void print(const char* isa, const std::string& what) const { std::printf("%s %s %016llx\n", isa, what.c_str(), static_cast<unsigned long long>(hash_)); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325;
};

// Numbers of both signs over seven powers of two, some of them zero.
struct Stream {
  uint64_t state;
  double next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const int exponent = static_cast<int>(state >> 40) % 7 - 3;
    const double x = static_cast<double>(static_cast<int64_t>(state) >> 20) * 0x1p-43;
    return (state >> 33) % 19 ? x * (exponent < 0 ? 1.0 / (1 << -exponent) : 1 << exponent) : 0.0;
  }
};

template <class T>
std::vector<T> numbers(int64_t n, uint64_t seed) {
  Stream stream{seed};
  std::vector<T> all(static_cast<size_t>(n));
  for (T& x : all) portable::store_acc(&x, static_cast<portable::Acc<T>>(stream.next()));
  return all;
}

// K gradients of batch * inner numbers, and the arguments that name them.
template <class T>
struct Problem {
  std::vector<T> data, out;
  std::vector<const void*> rows;
  std::vector<int> index;
  std::vector<char> mask;
  Grads grads{};
  Problem(Dtype dtype, int K, int64_t batch, int64_t inner, Per per, bool masked)
      : data(numbers<T>(K * batch * inner, static_cast<uint64_t>(K) * 1000003 + static_cast<uint64_t>(inner))), out(static_cast<size_t>(batch * inner)), mask(static_cast<size_t>(batch * K)) {
    for (int i = 0; i < K; ++i) rows.push_back(data.data() + i * batch * inner), index.push_back(i);
    for (size_t e = 0; e < mask.size(); ++e) mask[e] = e % 5 != 2;
    grads = {dtype, rows.data(), K, index.data(), K, batch, inner, per, masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr, K};
  }
  int64_t problems() const { return grads.per == Per::sample ? grads.batch : 1; }
};

template <class T>
void gradients(const CpuKernels& kernels, Dtype dtype) {
  Hash gram, combine, lengths, graddrop, trimmed;
  for (const int K : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 40})
    for (const int64_t inner : {1, 3, 17, 100, 1031, 4097, 9001})
      for (const Per per : {Per::batch, Per::sample, Per::batch_sum})
        for (const bool masked : {false, true}) {
          if (K > 9 && inner > 5000) continue;
          Problem<T> p(dtype, K, 3, inner, per, masked);
          std::vector<double> G(static_cast<size_t>(p.problems() * K * K)), total(static_cast<size_t>(p.problems() * 3));
          const auto w = numbers<double>(p.problems() * K, 7);
          kernels.gram(kOneThread, p.grads, G.data());
          gram.add(G.data(), p.problems() * K * K);
          kernels.combine(kOneThread, p.grads, w.data(), p.out.data());
          combine.add(p.out.data(), 3 * inner);
          kernels.lengths(kOneThread, p.grads, w.data(), total.data());
          lengths.add(total.data(), p.problems() * 3);
          if (per != Per::batch) continue;
          const double leak = 0.1;
          kernels.graddrop(kOneThread, p.grads, {&leak, 1, 99, 5, 0}, p.out.data());
          graddrop.add(p.out.data(), 3 * inner);
          kernels.trimmed_mean(kOneThread, p.grads, {nullptr, 0, 0, 0, K / 3}, p.out.data());
          trimmed.add(p.out.data(), 3 * inner);
        }
  const std::string type = std::string(" ") + kDtypes[static_cast<int>(dtype)];
  gram.print(kernels.isa, "gram" + type);
  combine.print(kernels.isa, "combine" + type);
  lengths.print(kernels.isa, "lengths" + type);
  graddrop.print(kernels.isa, "graddrop" + type);
  trimmed.print(kernels.isa, "trimmed_mean" + type);
}

SolveArgs arguments(const Rule& rule, int64_t batch, double precision) {
  SolveArgs args{};
  args.batch = batch;
  args.K = rule.K;
  args.steps = rule.steps.data();
  args.n_steps = static_cast<int>(rule.steps.size() / 2);
  args.params = rule.params.data();
  args.preserve_norm = true;
  args.precision = precision;
  args.G_stride = rule.K * rule.K;
  args.w_stride = rule.K;
  args.seed = 11;
  return args;
}

// A rule on gradients of the type, one problem and one per sample, and behind linear branches of one to three outputs; state over two calls.
template <class T>
void with_rule(const CpuKernels& kernels, Dtype dtype, const Rule& rule) {
  Hash resolve, heads;
  const int K = rule.K;
  constexpr int64_t kBatch = 5, kInputs = 33;
  std::vector<double> state;
  for (const Per per : {Per::batch, Per::sample}) {
    Problem<T> p(dtype, K, kBatch, 211, per, per == Per::sample);
    SolveArgs args = arguments(rule, p.problems(), gram_precision(dtype));
    std::vector<double> G(static_cast<size_t>(p.problems() * K * K)), w(static_cast<size_t>(p.problems() * K));
    args.state_stride = kernels.state_size(args);
    state.assign(static_cast<size_t>(p.problems() * args.state_stride) + 1, 0.0);
    args.state = args.state_stride ? state.data() : nullptr;
    args.G = G.data(), args.w = w.data();
    for (args.counter = 0; args.counter < 2; ++args.counter) {
      kernels.resolve(kOneThread, p.grads, args, true, p.out.data());
      resolve.add(w.data(), p.problems() * K);
      resolve.add(p.out.data(), kBatch * 211);
    }
    std::vector<int64_t> sizes;
    int64_t outputs = 0;
    for (int i = 0; i < K; ++i) sizes.push_back(1 + i % 3), outputs += sizes.back();
    const auto delta = numbers<T>(kBatch * 40 * outputs, 3), weight = numbers<T>(outputs * kInputs, 4);
    std::vector<portable::Factor<T>> left(delta.size()), right(weight.size());
    const Heads branches{dtype, delta.data(), weight.data(), kBatch, 40, outputs, kInputs, sizes.data(), K, per, nullptr, 0};
    kernels.heads(kOneThread, branches, args, left.data(), right.data());
    heads.add(w.data(), p.problems() * K);
    heads.add(left.data(), static_cast<int64_t>(left.size()));
    heads.add(right.data(), static_cast<int64_t>(right.size()));
  }
  const std::string what = rule.name + " K=" + std::to_string(K) + " " + kDtypes[static_cast<int>(dtype)];
  resolve.print(kernels.isa, "resolve " + what);
  heads.print(kernels.isa, "heads " + what);
}

}  // namespace

int main() {
  std::vector<Rule> rules;
  for (std::string name; std::cin >> name;) {
    auto steps = read_list<int64_t>();
    auto params = read_list<double>();
    const auto size = read_list<int>();
    rules.push_back({name, steps, params, size[0]});
  }
  const Available found = available_kernels();
  for (int i = 0; i < found.n; ++i)
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64})
      portable::with_type(dtype, [&](auto tag) {
        using T = decltype(tag);
        gradients<T>(*found.tables[i], dtype);
        for (const Rule& rule : rules) with_rule<T>(*found.tables[i], dtype, rule);
      });
}
