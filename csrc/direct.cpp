// mmfast._direct: the CPU operators on plain tensors, called past torch's dispatcher, which costs more than small gradients do.
// Tensors are seen through DLPack's C exchange interface and Python through its limited one, so one binary serves every torch, and every
// Python with a global lock.
// What is not plain is declined with None before anything has changed; the caller then goes by way of the dispatcher.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "gramian.h"

namespace mmfast {
namespace {

// What bind() was given, for as long as the process lives.
const CpuEntry* cpu;
const DLPackExchangeAPI* exchange;
PyObject *tensor_type, *parameter_type, *empty_like, *new_empty, *is_neg, *is_grad_enabled, *requires_grad, *observers;

// A new reference that is given back.
struct OwnedRef {
  PyObject* object;
  explicit OwnedRef(PyObject* o) : object(o) {}
  OwnedRef(const OwnedRef&) = delete;
  ~OwnedRef() { Py_XDECREF(object); }
};

// Whether the answer is yes; where asking fails too, for then the dispatcher shall say why.
bool is_true(PyObject* answer) {
  const OwnedRef owned(answer);
  const int truth = answer ? PyObject_IsTrue(answer) : -1;
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

bool view(PyObject* tensor, DLTensor& out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != tensor_type && type != parameter_type) return false;
  if (exchange->dltensor_from_py_object_no_sync(tensor, &out)) {
    PyErr_Clear();  // sparse, or of a transformation: no memory of its own
    return false;
  }
  if (out.device.device_type != kDLCPU || out.dtype.lanes != 1 || !out.data || out.byte_offset) return false;
  int64_t stride = 1;
  for (int i = out.ndim; i-- > 0; stride *= out.shape[i])
    if (out.strides[i] != stride) return false;
  return stride > 0;
}

bool has_dtype(const DLTensor& t, uint8_t code, uint8_t bits) { return t.dtype.code == code && t.dtype.bits == bits; }

int64_t numel(const DLTensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

bool dtype_of(const DLTensor& t, Dtype& dtype) {
  if (has_dtype(t, kDLFloat, 32)) dtype = Dtype::f32;
  else if (has_dtype(t, kDLFloat, 64)) dtype = Dtype::f64;
  else if (has_dtype(t, kDLBfloat, 16)) dtype = Dtype::bf16;
  else if (has_dtype(t, kDLFloat, 16)) dtype = Dtype::f16;
  else return false;
  return true;
}

// Whether somebody watches torch's operators, or they would not be the kernels alone.
bool observed() {
  for (Py_ssize_t i = 0; i < PyTuple_Size(observers); ++i)
    if (is_true(PyObject_CallObject(PyTuple_GetItem(observers, i), nullptr))) return true;
  return false;
}

bool recording() { return is_true(PyObject_CallObject(is_grad_enabled, nullptr)); }

// Whether there is more to it than its memory says: its sign is yet to be turned, or operations on it are recorded.
bool hides(PyObject* tensor, bool recorded) {
  return (recorded && is_true(PyObject_GetAttr(tensor, requires_grad))) || is_true(PyObject_CallFunctionObjArgs(is_neg, tensor, nullptr));
}

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

// Memory that is to be written, with all bits set where MMFAST_POISON asks for it (torch_api.h).
template <class T>
T* unwritten(void* memory, size_t bytes) {
  static const bool poison = std::getenv("MMFAST_POISON") != nullptr;
  if (poison) std::memset(memory, 0xff, bytes);
  return static_cast<T*>(memory);
}

// Other Python threads go on while this lives.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(thread_); }

 private:
  PyThreadState* thread_;
};

// A function for Python whose C++ exceptions become Python's.
template <PyObject* (*body)(PyObject* const*, Py_ssize_t)>
PyObject* guarded(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  try {
    return body(arguments, n);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    return PyErr_SetString(PyExc_RuntimeError, error.what()), nullptr;
  } catch (...) {
    return PyErr_SetString(PyExc_RuntimeError, "mmfast: a kernel failed"), nullptr;
  }
}

// Seed and counter of a random stream; null where it is not a plain one.
int64_t* stream_of(PyObject* rng) {
  DLTensor t;
  return view(rng, t) && has_dtype(t, kDLInt, 64) && numel(t) == 2 ? static_cast<int64_t*>(t.data) : nullptr;
}

PyObject* declined() { return Py_NewRef(Py_None); }

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
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mmfast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() { return PyModule_Create(&mmfast::module); }
