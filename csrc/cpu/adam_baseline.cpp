// The loops of cpu/adam.h for any CPU of the architecture.
#ifdef __x86_64__
#include <emmintrin.h>
#endif

#include "cpu/adam_isa.h"
// The target: what follows is for this instruction set.
#include "cpu/target_baseline.h"
// Its loops.
#include "cpu/block_body.h"
// On which these rest.
#include "cpu/adam_body.h"

namespace pycoll::cpu {
constinit const AdamKernels kBaselineAdam = make_adam_table();
}  // namespace pycoll::cpu
