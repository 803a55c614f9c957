// mmfast._direct: the CPU operators on plain tensors, called past torch's dispatcher, which costs more than small gradients do.
// Tensors are seen through DLPack's C exchange interface and Python through its limited one, so one binary serves every torch, and every
// Python with a global lock.
// What is not plain is declined with None before anything has changed; the caller then goes by way of the dispatcher.
#include "direct_tensors.h"

#include <memory>
#include <vector>

#include "feature_table.h"

namespace mmfast {
namespace {

// K gradients, None where one is missing, as the kernels take them.
class PlainGrads {
 public:
  // False where one is not a contiguous CPU tensor like the first, or somebody watches torch's operators.
  bool read(PyObject* gradients) {
    tuple_ = PyTuple_Check(gradients) ? Py_NewRef(gradients) : PyList_Check(gradients) ? PyList_AsTuple(gradients) : nullptr;
    if (!tuple_) return PyErr_Clear(), false;
    const Py_ssize_t K = PyTuple_Size(tuple_);
    if (K > kMaxRows) return false;
    if (observed()) return false;
    const bool recorded = recording();
    DLTensor first{};
    for (Py_ssize_t i = 0; i < K; ++i) {
      PyObject* g = PyTuple_GetItem(tuple_, i);
      if (g == Py_None) continue;
      DLTensor t;
      if (!view(g, t) || hides(g, recorded)) return false;
      if (!first_) {
        first_ = g;
        first = t;
      } else if (t.ndim != first.ndim || !has_dtype(t, first.dtype.code, first.dtype.bits) || std::memcmp(t.shape, first.shape, sizeof(int64_t) * t.ndim)) {
        return false;
      }
      rows_[grads.k] = t.data;
      row_index_[grads.k++] = static_cast<int>(i);
    }
    if (!first_ || !dtype_of(first, grads.dtype)) return false;
    grads.rows = rows_;
    grads.row_index = row_index_;
    grads.K = static_cast<int>(K);
    grads.batch = first.ndim ? first.shape[0] : 1;
    grads.inner = numel(first) / grads.batch;
    grads.per = Per::batch;
    bytes_ = static_cast<size_t>(numel(first)) * (first.dtype.bits / 8);
    return true;
  }
  // A new tensor like one gradient.
  PyObject* like_one() const { return PyObject_CallFunctionObjArgs(empty_like, first_, nullptr); }
  size_t bytes() const { return bytes_; }
  ~PlainGrads() { Py_XDECREF(tuple_); }

  Grads grads{};

 private:
  PyObject* tuple_ = nullptr;  // a tuple, which nobody can empty while other threads run
  PyObject* first_ = nullptr;
  size_t bytes_ = 0;
  const void* rows_[kMaxRows];
  int row_index_[kMaxRows];
};

// Seed and counter of a random stream; null where it is not a plain one.
int64_t* stream_of(PyObject* rng) {
  DLTensor t;
  return view(rng, t) && has_dtype(t, kDLInt, 64) && numel(t) == 2 ? static_cast<int64_t*>(t.data) : nullptr;
}

// Reads a list of numbers; false with an exception set.
bool read_doubles(PyObject* list, std::vector<double>& out) {
  if (!PyList_Check(list)) return PyErr_SetString(PyExc_TypeError, "the parameters of a rule are a list"), false;
  const Py_ssize_t n = PyList_Size(list);
  out.resize(n);
  for (Py_ssize_t i = 0; i < n; ++i) out[i] = PyFloat_AsDouble(PyList_GetItem(list, i));
  return !PyErr_Occurred();
}

// One rule and its problem, as the solver takes them.
class Problem {
 public:
  SolveArgs args{};
  // From (rule id, or (id, number of parameters, id, number of parameters) of two steps, [parameters], state or None, rng or None, preserve_norm); false where they are declined, or with an exception set.
  bool read(PyObject* const* a, int K, Dtype dtype) {
    if (!read_doubles(a[1], params_)) return false;
    const auto n_params = static_cast<int64_t>(params_.size());
    args.n_steps = PyTuple_Check(a[0]) ? 2 : 1;
    if (args.n_steps == 2) {
      if (PyTuple_Size(a[0]) != 4) return PyErr_SetString(PyExc_TypeError, "two steps are (rule id, number of parameters) twice"), false;
      for (int i = 0; i < 4; ++i) steps_[i] = PyLong_AsLongLong(PyTuple_GetItem(a[0], i));
    } else {
      steps_[0] = PyLong_AsLongLong(a[0]), steps_[1] = n_params;
    }
    if (PyErr_Occurred()) return false;
    if (args.n_steps == 2 && steps_[1] + steps_[3] != n_params) return false;
    args.batch = 1;
    args.K = K;
    args.precision = gram_precision(dtype);
    args.steps = steps_;
    args.params = params_.data();
    args.preserve_norm = is_true(Py_NewRef(a[4]));
    args.w_stride = args.G_stride = K + int64_t{K} * K;
    if (!cpu->kernels->accepts(args)) return false;
    const int64_t size = cpu->kernels->state_size(args);
    if (a[2] != Py_None || size) {
      DLTensor state;
      if (a[2] == Py_None || !view(a[2], state) || !has_dtype(state, kDLFloat, 64) || state.ndim != 1 || numel(state) != size) return false;
      args.state = static_cast<double*>(state.data);
      args.state_stride = size;
    }
    stream_ = a[3] == Py_None ? nullptr : stream_of(a[3]);
    return a[3] == Py_None || stream_;
  }
  size_t info_size() const { return static_cast<size_t>(args.w_stride); }
  PyObject* new_info() const {
    const OwnedRef size(PyLong_FromSize_t(info_size()));
    return PyObject_CallFunctionObjArgs(new_empty, size.object, nullptr);
  }
  // The last that is done before the kernels: weights and Gramian go there, and the random stream moves on.
  void begin(void* info) {
    args.w = unwritten<double>(info, info_size() * sizeof(double));
    args.G = args.w + args.K;
    if (!stream_) return;
    args.seed = static_cast<uint64_t>(stream_[0]);
    args.counter = static_cast<uint32_t>(stream_[1]++);
  }

 private:
  int64_t steps_[4];
  std::vector<double> params_;
  int64_t* stream_ = nullptr;
};

// (grads, rule id or steps, [parameters], state or None, rng or None, preserve_norm, with_gram, with_info) -> (result, info or None), or None
PyObject* resolve(PyObject* const* a, Py_ssize_t n) {
  if (n != 8) return PyErr_SetString(PyExc_TypeError, "resolve takes 8 arguments"), nullptr;
  PlainGrads in;
  if (!in.read(a[0])) return declined();
  Problem problem;
  if (!problem.read(a + 1, in.grads.K, in.grads.dtype)) return PyErr_Occurred() ? nullptr : declined();
  const bool with_gram = is_true(Py_NewRef(a[6])), with_info = is_true(Py_NewRef(a[7]));
  const OwnedRef out(in.like_one()), info(with_info ? problem.new_info() : Py_NewRef(Py_None));
  if (!out.object || !info.object) return nullptr;
  DLTensor result, written;
  if (!view(out.object, result) || (with_info && !view(info.object, written))) return declined();
  double small[16 + 16 * 16];
  std::unique_ptr<double[]> large;
  if (!with_info && problem.info_size() > sizeof small / sizeof *small) large.reset(new double[problem.info_size()]);
  problem.begin(with_info ? written.data : large ? large.get() : small);
  void* to = unwritten<void>(result.data, in.bytes());
  {
    const WithoutGil released;
    cpu->kernels->resolve(cpu->pool(), in.grads, problem.args, with_gram, to);
  }
  return PyTuple_Pack(2, out.object, info.object);
}

// (delta, weight, head_of, K, rule id or steps, [parameters], state or None, rng or None, preserve_norm) -> (what delta is to be multiplied with, info) of
// linear branches without a mask and one problem for the batch, or None
PyObject* heads(PyObject* const* a, Py_ssize_t n) {
  if (n != 9) return PyErr_SetString(PyExc_TypeError, "heads takes 9 arguments"), nullptr;
  const long K = PyLong_AsLong(a[3]);
  if (PyErr_Occurred()) return nullptr;
  DLTensor delta, weight, head_of;
  Heads h{};
  if (K < 1 || K > kMaxRows || observed() || !view(a[0], delta) || !view(a[1], weight) || !view(a[2], head_of)) return declined();
  const bool recorded = recording();
  if (hides(a[0], recorded) || hides(a[1], recorded) || !dtype_of(delta, h.dtype) || h.dtype == Dtype::f16 || !has_dtype(weight, delta.dtype.code, delta.dtype.bits) ||
      !has_dtype(head_of, kDLInt, 64) || delta.ndim < 1 || weight.ndim != 2 || delta.shape[delta.ndim - 1] != weight.shape[0] || numel(head_of) != weight.shape[0])
    return declined();
  h.delta = delta.data, h.weight = weight.data;
  h.outputs = weight.shape[0], h.inputs = weight.shape[1];
  h.batch = delta.ndim > 1 ? delta.shape[0] : 1;
  h.rows = numel(delta) / (h.batch * h.outputs);
  h.K = static_cast<int>(K);
  h.per = Per::batch;
  int64_t sizes[kMaxRows] = {};
  if (!branch_sizes(static_cast<const int64_t*>(head_of.data), h.outputs, K, sizes)) return declined();
  h.sizes = sizes;
  Problem problem;
  if (!problem.read(a + 4, h.K, h.dtype)) return PyErr_Occurred() ? nullptr : declined();
  const OwnedRef out(PyObject_CallFunctionObjArgs(empty_like, a[1], nullptr)), info(problem.new_info());
  if (!out.object || !info.object) return nullptr;
  DLTensor right, written;
  if (!view(out.object, right) || !view(info.object, written)) return declined();
  problem.begin(written.data);
  void* to = unwritten<void>(right.data, static_cast<size_t>(numel(right)) * (right.dtype.bits / 8));
  {
    const WithoutGil released;
    cpu->kernels->heads(cpu->pool(), h, problem.args, nullptr, to);
  }
  return PyTuple_Pack(2, out.object, info.object);
}

// (grads, [leaks], rng) for GradDrop, (grads, trim, None) for TrimmedMean -> result, or None
PyObject* elementwise(PyObject* const* a, Py_ssize_t n) {
  if (n != 3) return PyErr_SetString(PyExc_TypeError, "elementwise takes 3 arguments"), nullptr;
  PlainGrads in;
  if (!in.read(a[0])) return declined();
  ElementwiseArgs args{};
  const bool drop = a[2] != Py_None;
  int64_t* stream = drop ? stream_of(a[2]) : nullptr;
  if (drop && !stream) return declined();
  std::vector<double> leaks;
  if (drop) {
    if (!read_doubles(a[1], leaks) || (leaks.size() != 1 && leaks.size() != static_cast<size_t>(in.grads.K))) return PyErr_Occurred() ? nullptr : declined();
    args.leaks = leaks.data();
    args.n_leaks = static_cast<int>(leaks.size());
  } else {
    const long trim = PyLong_AsLong(a[1]);
    if (trim < 0 && !PyErr_Occurred()) return declined();
    args.trim = static_cast<int>(trim < kMaxRows ? trim : kMaxRows);
  }
  if (PyErr_Occurred()) return nullptr;
  const OwnedRef out(in.like_one());
  if (!out.object) return nullptr;
  DLTensor result;
  if (!view(out.object, result)) return declined();
  if (drop) {
    args.seed = static_cast<uint64_t>(stream[0]);
    args.counter = static_cast<uint32_t>(stream[1]++);
  }
  const auto kernel = drop ? cpu->kernels->graddrop : cpu->kernels->trimmed_mean;
  void* to = unwritten<void>(result.data, in.bytes());
  {
    const WithoutGil released;
    kernel(cpu->pool(), in.grads, args, to);
  }
  return Py_NewRef(out.object);
}

// The features of a table int64 [K, 2] with w [K] or null, of outputs in all; false where they are not as they should be.
bool read_features_of(PyObject* table, PyObject* w, int64_t outputs, std::vector<Feature>& features) {
  DLTensor t, scales{};
  if (!view(table, t) || !has_dtype(t, kDLInt, 64) || t.ndim != 2 || t.shape[1] != 2 || (w && (!view(w, scales) || numel(scales) != t.shape[0]))) return false;
  const int64_t* rows = static_cast<const int64_t*>(t.data);
  if (!w) return read_features<double>(rows, nullptr, t.shape[0], outputs, features);
  if (has_dtype(scales, kDLFloat, 32)) return read_features(rows, static_cast<const float*>(scales.data), t.shape[0], outputs, features);
  return has_dtype(scales, kDLFloat, 64) && read_features(rows, static_cast<const double*>(scales.data), t.shape[0], outputs, features);
}

bool f32_or_f64(const DLTensor& t, Dtype& dtype) { return dtype_of(t, dtype) && (dtype == Dtype::f32 || dtype == Dtype::f64); }

// (raw, x, seen or None, features, w, slopes) -> (log-likelihoods, their derivatives or None), or None
PyObject* log_prob(PyObject* const* a, Py_ssize_t n) {
  if (n != 6) return PyErr_SetString(PyExc_TypeError, "log_prob takes 6 arguments"), nullptr;
  LogProb in{};
  DLTensor raw, x, seen;
  std::vector<Feature> features;
  if (observed() || !view(a[0], raw) || !view(a[1], x) || raw.ndim < 1 || raw.ndim > 8 || x.ndim != 2 || !f32_or_f64(raw, in.dtype) || !has_dtype(x, raw.dtype.code, raw.dtype.bits))
    return declined();
  const bool recorded = recording(), with_slopes = is_true(Py_NewRef(a[5]));
  in.outputs = raw.shape[raw.ndim - 1], in.rows = numel(raw) / in.outputs;
  if (hides(a[0], recorded) || hides(a[1], recorded) || hides(a[4], recorded) || !read_features_of(a[3], a[4], in.outputs, features)) return declined();
  in.raw = raw.data, in.x = x.data;
  in.features = features.data(), in.count = static_cast<int64_t>(features.size()), in.x_rows = x.shape[0];
  if (x.shape[1] != in.count || in.rows % in.x_rows) return declined();
  if (a[2] != Py_None) {
    if (!view(a[2], seen) || seen.ndim != 2 || seen.shape[0] != in.x_rows || seen.shape[1] != in.count) return declined();
    in.seen_is_bool = has_dtype(seen, kDLBool, 8);
    if (!in.seen_is_bool && !has_dtype(seen, raw.dtype.code, raw.dtype.bits)) return declined();
    in.seen = seen.data;
  }
  const OwnedRef shape(PyTuple_New(raw.ndim));
  if (!shape.object) return nullptr;
  for (int i = 0; i < raw.ndim; ++i) PyTuple_SetItem(shape.object, i, PyLong_FromLongLong(i + 1 < raw.ndim ? raw.shape[i] : in.count));
  const OwnedRef out(PyObject_CallMethodObjArgs(a[0], new_empty_name, shape.object, nullptr));
  const OwnedRef slopes(with_slopes ? PyObject_CallFunctionObjArgs(empty_like, a[0], nullptr) : Py_NewRef(Py_None));
  DLTensor result, derivatives;
  if (!out.object || !slopes.object) return nullptr;
  if (!view(out.object, result) || (with_slopes && !view(slopes.object, derivatives))) return declined();
  const size_t size = raw.dtype.bits / 8;
  void* to = unwritten<void>(result.data, static_cast<size_t>(in.rows * in.count) * size);
  void* beside = with_slopes ? unwritten<void>(derivatives.data, static_cast<size_t>(in.rows * in.outputs) * size) : nullptr;
  int64_t wrong;
  {
    const WithoutGil released;
    wrong = cpu->kernels->log_prob(cpu->pool(), in, to, beside);
  }
  return wrong < 0 ? PyTuple_Pack(2, out.object, slopes.object) : declined();  // the operator says what is wrong
}

// (grad, slopes, features) -> the gradient of the outputs, or None
PyObject* log_prob_backward(PyObject* const* a, Py_ssize_t n) {
  if (n != 3) return PyErr_SetString(PyExc_TypeError, "log_prob_backward takes 3 arguments"), nullptr;
  LogProb in{};
  DLTensor grad, slopes, result;
  std::vector<Feature> features;
  Dtype dtype;
  if (observed() || !view_strided(a[0], grad) || !view(a[1], slopes) || slopes.ndim < 1 || grad.ndim < 1 || !f32_or_f64(slopes, in.dtype) || !dtype_of(grad, dtype) || dtype != in.dtype) return declined();
  const bool recorded = recording();
  in.outputs = slopes.shape[slopes.ndim - 1], in.rows = numel(slopes) / in.outputs;
  if (hides(a[0], recorded) || hides(a[1], recorded) || !read_features_of(a[2], nullptr, in.outputs, features)) return declined();
  in.features = features.data(), in.count = static_cast<int64_t>(features.size());
  GradOfLogProb back;
  if (grad.shape[grad.ndim - 1] != in.count || numel(grad) != in.rows * in.count || !rows_and_features(grad.data, grad.shape, grad.strides, grad.ndim, back)) return declined();
  const OwnedRef out(PyObject_CallFunctionObjArgs(empty_like, a[1], nullptr));
  if (!out.object) return nullptr;
  if (!view(out.object, result)) return declined();
  void* to = unwritten<void>(result.data, static_cast<size_t>(numel(slopes)) * (slopes.dtype.bits / 8));
  {
    const WithoutGil released;
    cpu->kernels->log_prob_backward(cpu->pool(), in, slopes.data, back, to);
  }
  return Py_NewRef(out.object);
}

// bind(address of the CpuEntry, torch.Tensor, torch.nn.Parameter, torch.empty_like, new_empty of a float64 tensor, torch.is_grad_enabled,
// observers): torch, as the functions above use it. Where one of the observers says yes, operators must be called.
PyObject* bind(PyObject* const* a, Py_ssize_t n) {
  if (n != 7 || !PyTuple_Check(a[6])) return PyErr_SetString(PyExc_TypeError, "bind takes 7 arguments, the last a tuple"), nullptr;
  const OwnedRef capsule(PyObject_GetAttrString(a[1], "__dlpack_c_exchange_api__"));
  if (!capsule.object) return nullptr;
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.object, "dlpack_exchange_api"));
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync)
    return PyErr_SetString(PyExc_ImportError, "torch's DLPack exchange interface is of another version"), nullptr;
  is_neg = PyObject_GetAttrString(a[1], "is_neg");
  requires_grad = PyUnicode_InternFromString("requires_grad");
  new_empty_name = PyUnicode_InternFromString("new_empty");
  cpu = static_cast<const CpuEntry*>(PyLong_AsVoidPtr(a[0]));
  if (!is_neg || !requires_grad || PyErr_Occurred()) return nullptr;
  tensor_type = Py_NewRef(a[1]);
  parameter_type = Py_NewRef(a[2]);
  empty_like = Py_NewRef(a[3]);
  new_empty = Py_NewRef(a[4]);
  is_grad_enabled = Py_NewRef(a[5]);
  observers = Py_NewRef(a[6]);
  return Py_NewRef(Py_None);
}

template <PyObject* (*body)(PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<body>)), METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {
    method<bind>("bind"),
    method<resolve>("resolve"),
    method<heads>("heads"),
    method<elementwise>("elementwise"),
    method<log_prob>("log_prob"),
    method<log_prob_backward>("log_prob_backward"),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mmfast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() { return PyModule_Create(&mmfast::module); }
