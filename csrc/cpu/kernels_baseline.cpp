// The kernels for any CPU of the architecture: SSE2 on x86-64.
#include "cpu/kernels_isa.h"

#ifndef __clang__
#pragma GCC optimize("O3")  // vectorizes, whatever the build asks for
#endif

namespace pycoll::cpu {
namespace {

constexpr const char* kIsa = "baseline";
constexpr size_t kCopyLoopFrom = 1, kCopyLoopTo = 0;  // never: memcpy is faster
struct Halves {
  static constexpr size_t kVector = 0;
  static void widen(float*, const void*);
  static void narrow(void*, const float*);
};

}  // namespace
}  // namespace pycoll::cpu

#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kBaselineKernels = make_table();
}  // namespace pycoll::cpu
