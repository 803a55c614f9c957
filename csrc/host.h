// What the parts of mmfast._host share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

namespace mmfast {

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;

void define_gpu(py::module_& m);   // host_gpu.cpp
void define_warp(py::module_& m);  // host_warp.cpp

}  // namespace mmfast
