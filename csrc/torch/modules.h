// The parts that pycoll._C is made of.
#pragma once

#include <torch/extension.h>

namespace pycoll::bindings {

void bind_communicator(py::module_& m);
void bind_backend(py::module_& m);
void bind_ceiling(py::module_& m);
void bind_local_group(py::module_& m);  // where CUDA is built

}  // namespace pycoll::bindings
