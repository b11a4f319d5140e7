// Python's lock, for what waits in a destructor: whoever drops a storage or a LocalGroup holds it, and what is waited for
// may need it (a host function on a stream).
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace pycoll::bindings {

// Lets go of the lock for its life, if this thread holds it. Not while the interpreter ends, when nobody else gets it.
class GilReleased {
 public:
  GilReleased() {
    if (Py_IsInitialized() && PyGILState_Check()) thread_ = PyEval_SaveThread();
  }
  ~GilReleased() {
    if (thread_ == nullptr) return;
    // Python 3.14 stops a thread that comes back while the interpreter ends. Earlier ones unwind it, which ends the
    // process where a destructor is on the way: so it is stopped here.
    while (is_finalizing()) std::this_thread::sleep_for(std::chrono::seconds(1));
    PyEval_RestoreThread(thread_);
  }
  GilReleased(const GilReleased&) = delete;

 private:
  static bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }

  PyThreadState* thread_ = nullptr;
};

}  // namespace pycoll::bindings
