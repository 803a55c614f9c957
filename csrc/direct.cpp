// mmfast._direct: the CPU operators on plain tensors, called past torch's dispatcher, which costs more than small gradients do.
// Tensors are seen through DLPack's C exchange interface and Python through its limited one, so one binary serves every torch, and every
// Python with a global lock.
// What is not plain is declined with None before anything has changed; the caller then goes by way of the dispatcher.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <cfloat>
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
PyObject *tensor_type, *empty_like, *new_empty, *is_neg, *is_grad_enabled, *requires_grad, *observers;

// A new reference that is given back.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* o) : object(o) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
};

// Whether the answer is yes; where asking fails too, for then the dispatcher shall say why.
bool yes(PyObject* answer) {
  const Owned owned(answer);
  const int truth = answer ? PyObject_IsTrue(answer) : -1;
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

bool view(PyObject* tensor, DLTensor& out) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type) return false;
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

bool is(const DLTensor& t, uint8_t code, uint8_t bits) { return t.dtype.code == code && t.dtype.bits == bits; }

int64_t numel(const DLTensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; ++i) n *= t.shape[i];
  return n;
}

bool dtype_of(const DLTensor& t, Dtype& dtype) {
  if (is(t, kDLFloat, 32)) dtype = Dtype::f32;
  else if (is(t, kDLFloat, 64)) dtype = Dtype::f64;
  else if (is(t, kDLBfloat, 16)) dtype = Dtype::bf16;
  else if (is(t, kDLFloat, 16)) dtype = Dtype::f16;
  else return false;
  return true;
}

// K gradients, None where one is missing, as the kernels take them.
class Plain {
 public:
  // False where one is not a contiguous CPU tensor like the first, or somebody watches torch's operators.
  bool read(PyObject* gradients) {
    held_ = PyTuple_Check(gradients) ? Py_NewRef(gradients) : PyList_Check(gradients) ? PyList_AsTuple(gradients) : nullptr;
    if (!held_) return PyErr_Clear(), false;
    const Py_ssize_t K = PyTuple_Size(held_);
    if (K > kMaxRows) return false;
    for (Py_ssize_t i = 0; i < PyTuple_Size(observers); ++i)
      if (yes(PyObject_CallObject(PyTuple_GetItem(observers, i), nullptr))) return false;
    const bool recording = yes(PyObject_CallObject(is_grad_enabled, nullptr));
    DLTensor first{};
    for (Py_ssize_t i = 0; i < K; ++i) {
      PyObject* g = PyTuple_GetItem(held_, i);
      if (g == Py_None) continue;
      DLTensor t;
      if (!view(g, t) || (recording && yes(PyObject_GetAttr(g, requires_grad))) || yes(PyObject_CallFunctionObjArgs(is_neg, g, nullptr))) return false;
      if (!first_) {
        first_ = g;
        first = t;
      } else if (t.ndim != first.ndim || !is(t, first.dtype.code, first.dtype.bits) || std::memcmp(t.shape, first.shape, sizeof(int64_t) * t.ndim)) {
        return false;
      }
      rows_[grads.k] = t.data;
      places_[grads.k++] = static_cast<int>(i);
    }
    if (!first_ || !dtype_of(first, grads.dtype)) return false;
    grads.rows = rows_;
    grads.places = places_;
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
  ~Plain() { Py_XDECREF(held_); }

  Grads grads{};

 private:
  PyObject* held_ = nullptr;  // a tuple, which nobody can empty while other threads run
  PyObject* first_ = nullptr;
  size_t bytes_ = 0;
  const void* rows_[kMaxRows];
  int places_[kMaxRows];
};

// What is to be written, with all bits set where MMFAST_POISON asks for it (torch_api.h).
template <class T>
T* fresh(void* memory, size_t bytes) {
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
  return view(rng, t) && is(t, kDLInt, 64) && numel(t) == 2 ? static_cast<int64_t*>(t.data) : nullptr;
}

PyObject* declined() { return Py_NewRef(Py_None); }

// (grads, rule id, [parameters], state or None, rng or None, preserve_norm, with_gram, with_info) -> (result, info or None), or None
PyObject* resolve(PyObject* const* a, Py_ssize_t n) {
  if (n != 8 || !PyList_Check(a[2])) return PyErr_SetString(PyExc_TypeError, "resolve takes 8 arguments, the third a list"), nullptr;
  Plain in;
  if (!in.read(a[0])) return declined();
  const int K = in.grads.K;
  const Py_ssize_t n_params = PyList_Size(a[2]);
  const int64_t steps[] = {PyLong_AsLongLong(a[1]), n_params};
  std::vector<double> params(n_params);
  for (Py_ssize_t i = 0; i < n_params; ++i) params[i] = PyFloat_AsDouble(PyList_GetItem(a[2], i));
  if (PyErr_Occurred()) return nullptr;
  SolveArgs args{};
  args.batch = 1;
  args.K = K;
  args.precision = in.grads.dtype == Dtype::f64 ? DBL_EPSILON : FLT_EPSILON;
  args.steps = steps;
  args.n_steps = 1;
  args.params = params.data();
  args.preserve_norm = yes(Py_NewRef(a[5]));
  if (!cpu->kernels->accepts(args)) return declined();
  const int64_t size = cpu->kernels->state_size(args);
  if (a[3] != Py_None || size) {
    DLTensor state;
    if (a[3] == Py_None || !view(a[3], state) || !is(state, kDLFloat, 64) || state.ndim != 1 || numel(state) != size) return declined();
    args.state = static_cast<double*>(state.data);
    args.state_stride = size;
  }
  int64_t* stream = a[4] == Py_None ? nullptr : stream_of(a[4]);
  if (a[4] != Py_None && !stream) return declined();
  const bool with_gram = yes(Py_NewRef(a[6])), with_info = yes(Py_NewRef(a[7]));

  const Owned out(in.like_one());
  if (!out.object) return nullptr;
  const size_t width = static_cast<size_t>(K) + static_cast<size_t>(K) * K;
  const Owned size_of_info(PyLong_FromSize_t(width));
  const Owned info(with_info ? PyObject_CallFunctionObjArgs(new_empty, size_of_info.object, nullptr) : Py_NewRef(Py_None));
  if (!info.object) return nullptr;
  DLTensor result, written;
  if (!view(out.object, result) || (with_info && !view(info.object, written))) return declined();
  double small[16 + 16 * 16];
  std::unique_ptr<double[]> large;
  if (!with_info && width > sizeof small / sizeof *small) large.reset(new double[width]);
  args.w = fresh<double>(with_info ? written.data : large ? large.get() : small, width * sizeof(double));
  args.G = args.w + K;
  args.w_stride = args.G_stride = static_cast<int64_t>(width);
  if (stream) {
    args.seed = static_cast<uint64_t>(stream[0]);
    args.counter = static_cast<uint32_t>(stream[1]++);
  }
  void* to = fresh<void>(result.data, in.bytes());
  {
    const WithoutGil released;
    cpu->kernels->resolve(cpu->pool(), in.grads, args, with_gram, to);
  }
  return PyTuple_Pack(2, out.object, info.object);
}

// (grads, leak, rng) for GradDrop, (grads, trim, None) for TrimmedMean -> result, or None
PyObject* elementwise(PyObject* const* a, Py_ssize_t n) {
  if (n != 3) return PyErr_SetString(PyExc_TypeError, "elementwise takes 3 arguments"), nullptr;
  Plain in;
  if (!in.read(a[0])) return declined();
  ElementwiseArgs args{};
  const bool drop = a[2] != Py_None;
  int64_t* stream = drop ? stream_of(a[2]) : nullptr;
  if (drop && !stream) return declined();
  if (drop) {
    args.leak = PyFloat_AsDouble(a[1]);
  } else {
    const long trim = PyLong_AsLong(a[1]);
    if (trim < 0 && !PyErr_Occurred()) return declined();
    args.trim = static_cast<int>(trim < kMaxRows ? trim : kMaxRows);
  }
  if (PyErr_Occurred()) return nullptr;
  const Owned out(in.like_one());
  if (!out.object) return nullptr;
  DLTensor result;
  if (!view(out.object, result)) return declined();
  if (drop) {
    args.seed = static_cast<uint64_t>(stream[0]);
    args.counter = static_cast<uint32_t>(stream[1]++);
  }
  const auto kernel = drop ? cpu->kernels->graddrop : cpu->kernels->trimmed_mean;
  void* to = fresh<void>(result.data, in.bytes());
  {
    const WithoutGil released;
    kernel(cpu->pool(), in.grads, args, to);
  }
  return Py_NewRef(out.object);
}

// bind(address of the CpuEntry, torch.Tensor, torch.empty_like, new_empty of a float64 tensor, torch.is_grad_enabled, observers): torch, as the
// two above use it. Where one of the observers says yes, somebody wants to see operators go by.
PyObject* bind(PyObject* const* a, Py_ssize_t n) {
  if (n != 6 || !PyTuple_Check(a[5])) return PyErr_SetString(PyExc_TypeError, "bind takes 6 arguments, the last a tuple"), nullptr;
  const Owned capsule(PyObject_GetAttrString(a[1], "__dlpack_c_exchange_api__"));
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
  empty_like = Py_NewRef(a[2]);
  new_empty = Py_NewRef(a[3]);
  is_grad_enabled = Py_NewRef(a[4]);
  observers = Py_NewRef(a[5]);
  return Py_NewRef(Py_None);
}

template <PyObject* (*body)(PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<body>)), METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {
    method<bind>("bind"),
    method<resolve>("resolve"),
    method<elementwise>("elementwise"),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mmfast

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__direct() { return PyModule_Create(&mmfast::module); }
