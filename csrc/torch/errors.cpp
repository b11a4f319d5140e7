#include "torch/errors.h"

#include <torch/extension.h>

#include <cstring>

namespace pycoll::bindings {

namespace {

PyObject* error_class(ErrorKind kind) {
  static PyObject* const classes =
      py::module_::import("pycoll.errors").release().ptr();      // lives as long as the process
  return py::getattr(classes, cpu::name(kind)).release().ptr();  // the module keeps it
}

void raise(ErrorKind kind, const char* what, int rank) {
  const py::object type = py::reinterpret_steal<py::object>(error_class(kind));
  const auto text = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(what, static_cast<Py_ssize_t>(std::strlen(what)), "replace"));
  const py::object error = type(text);
  if (rank >= 0) error.attr("rank") = rank;
  PyErr_SetObject(type.ptr(), error.ptr());
}

}  // namespace

PyObject* PyError::python_type() {
  PyObject* type = error_class(kind);
  Py_DECREF(type);  // borrowed from its module, as torch expects
  return type;
}

std::exception_ptr for_python(std::exception_ptr failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const Error& e) {
    return std::make_exception_ptr(PyError(e));
  } catch (...) {
    return failure;
  }
}

void throw_unsupported(const std::string& what) { throw PyError(Error(ErrorKind::kUnsupported, "pycoll: " + what)); }
void throw_usage(const std::string& what) { throw PyError(Error(ErrorKind::kUsage, "pycoll: " + what)); }

void register_errors() {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PyError& e) {
      raise(e.kind, e.what(), e.rank);
    } catch (const Error& e) {
      raise(e.kind, e.what(), e.rank);
    }
  });
}

}  // namespace pycoll::bindings
