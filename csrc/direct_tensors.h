// How mmfast._direct sees tensors, and what it needs of torch; included once, by direct.cpp.
#pragma once

#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include "cpu/kernels.h"
#include "gramian.h"

namespace mmfast {
namespace {

// What bind() was given, for as long as the process lives.
const CpuEntry* cpu;
const DLPackExchangeAPI* exchange;
PyObject *tensor_type, *parameter_type, *empty_like, *new_empty, *is_neg, *is_grad_enabled, *requires_grad, *observers, *new_empty_name;

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

// A CPU tensor in any layout.
bool view_strided(PyObject* tensor, DLTensor& out) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != tensor_type && type != parameter_type) return false;
  if (exchange->dltensor_from_py_object_no_sync(tensor, &out)) {
    PyErr_Clear();  // sparse, or of a transformation: no memory of its own
    return false;
  }
  return out.device.device_type == kDLCPU && out.dtype.lanes == 1 && out.data && !out.byte_offset;
}

bool view(PyObject* tensor, DLTensor& out) {
  if (!view_strided(tensor, out)) return false;
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

PyObject* declined() { return Py_NewRef(Py_None); }

}  // namespace
}  // namespace mmfast
