// The loops of cpu/adam.h for x86-64 with AVX-512 F, BW, DQ and VL.
#ifdef __x86_64__

#include <immintrin.h>

#include "cpu/adam_isa.h"
// The target: what follows is for this instruction set.
#include "cpu/target_avx512.h"
// Its loops.
#include "cpu/block_body.h"
// On which these rest.
#include "cpu/adam_body.h"

namespace pycoll::cpu {
constinit const AdamKernels kAvx512Adam = make_adam_table();
}  // namespace pycoll::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
