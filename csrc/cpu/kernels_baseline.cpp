// The kernels for any CPU of the architecture: SSE2 on x86-64.
#include "cpu/kernels_isa.h"

#ifndef __clang__
#pragma GCC optimize("O3")  // loops are vectorized, however the build is set
#endif

namespace pycoll::cpu {
namespace {

constexpr const char* kIsa = "baseline";
constexpr size_t kHalfVector = 0;
void widen_halves(float*, const void*);
void narrow_halves(void*, const float*);

}  // namespace
}  // namespace pycoll::cpu

#include "cpu/kernels_body.inl"

namespace pycoll::cpu {
constinit const Kernels kBaselineKernels = make_table();
}  // namespace pycoll::cpu
