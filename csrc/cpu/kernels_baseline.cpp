// The kernels for any CPU of the architecture: SSE2 on x86-64.
#ifdef __x86_64__
#include <emmintrin.h>
#endif

#include "cpu/kernels_isa.h"
// The target: what follows is for this instruction set.
#include "cpu/target_baseline.h"
// Its loops.
#include "cpu/block_body.h"
#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kBaselineKernels = make_table();
}  // namespace pycoll::cpu
