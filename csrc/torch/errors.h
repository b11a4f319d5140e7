// cpu::Error on its way to Python: the classes of pycoll/errors.py, also through autograd and through torch's own
// bindings.
#pragma once

#include <torch/csrc/Exceptions.h>

#include <exception>
#include <string>

#include "cpu/error.h"

namespace pycoll::bindings {

using cpu::Error;
using cpu::ErrorKind;

// What torch's own entry points (autograd, Work.wait) know how to raise with its type.
class PyError : public torch::PyTorchError {
 public:
  explicit PyError(const Error& e) : torch::PyTorchError(e.what()), kind(e.kind), rank(e.rank) {}
  PyObject* python_type() override;

  ErrorKind kind;
  int rank;
};

// The same failure as a PyError, if it is an Error; else itself.
std::exception_ptr for_python(std::exception_ptr failure);

[[noreturn]] void throw_unsupported(const std::string& what);
[[noreturn]] void throw_usage(const std::string& what);

// Teaches pybind11 to raise the classes of pycoll.errors, with their `rank`.
void register_errors();

}  // namespace pycoll::bindings
