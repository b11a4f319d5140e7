// Between the files that build the loops of cpu/adam.h for one instruction set each and the one that chooses.
#pragma once

#include "cpu/adam.h"
#include "cpu/kernels_isa.h"

namespace pycoll::cpu {

extern const AdamKernels kBaselineAdam;
#ifdef __x86_64__
extern const AdamKernels kAvx2Adam;
extern const AdamKernels kAvx512Adam;
#endif

}  // namespace pycoll::cpu
