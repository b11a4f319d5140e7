// The kernels for x86-64 with AVX2 and F16C.
#ifdef __x86_64__

#include <immintrin.h>

#include "cpu/kernels_isa.h"
// The target: what follows is for this instruction set.
#include "cpu/target_avx2.h"
// Its loops.
#include "cpu/block_body.h"
#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kAvx2Kernels = make_table();
}  // namespace pycoll::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
