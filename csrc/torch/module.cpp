// pycoll._C: the extension module.
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/kernels.h"
#include "cpu/os.h"
#include "cpu/wait.h"
#include "torch/errors.h"
#include "torch/modules.h"

namespace pycoll::bindings {
namespace {

// Python runs signal handlers on its main thread only; a wait there lets them in.
void check_signals() {
  if (syscall(SYS_gettid) != getpid() || !Py_IsInitialized()) return;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace
}  // namespace pycoll::bindings

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "pycoll's native half; use it through the package pycoll.";
  pycoll::bindings::register_errors();
  pycoll::cpu::set_interrupt_check(pycoll::bindings::check_signals);
  m.attr("simd") = pycoll::cpu::kernels().isa;
  m.def("available_cores", &pycoll::cpu::available_cores, "Cores that this process may use.");
  m.def("physical_memory", &pycoll::cpu::physical_memory, "Bytes of memory of this machine.");
  pycoll::bindings::bind_communicator(m);
  pycoll::bindings::bind_backend(m);
  pycoll::bindings::bind_ceiling(m);
  pycoll::bindings::bind_adam(m);
#ifdef PYCOLL_WITH_CUDA
  pycoll::bindings::bind_local_group(m);
#endif
}
