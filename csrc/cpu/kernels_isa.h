// Between the files that build the kernels for one instruction set each and the one that chooses: their tables, and
// what they all include before their target pragma.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

// Before a loop: no iteration depends on another.
#ifdef __clang__
#define PYCOLL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PYCOLL_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace pycoll::cpu {

extern const Kernels kBaselineKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;    // AVX2, F16C
extern const Kernels kAvx512Kernels;  // AVX-512 F, BW, DQ, VL, in vectors of 512 bits
#endif

}  // namespace pycoll::cpu
