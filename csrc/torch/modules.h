// The parts that pycoll._C is made of.
#pragma once

#include <torch/extension.h>

namespace pycoll::bindings {

void bind_communicator(py::module_& m);
void bind_backend(py::module_& m);
void bind_ceiling(py::module_& m);
void bind_adam(py::module_& m);
void bind_local_group(py::module_& m);  // where CUDA is built

// What torch.cuda.MemPool takes: an allocator that takes its memory from `allocate`. Where CUDA is built.
py::object make_mem_allocator(const std::function<at::Tensor(int64_t)>& allocate);

}  // namespace pycoll::bindings
