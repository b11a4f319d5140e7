// The choice of the instruction set for cpu/adam.h: that of cpu/kernels.h.
#include "cpu/adam.h"

#include <cstring>

#include "cpu/adam_isa.h"
#include "cpu/kernels.h"
#include "cpu/os.h"

namespace pycoll::cpu {

const AdamKernels& adam_kernels() {
  static const AdamKernels& chosen = *adam_kernels_for(kernels().isa);
  return chosen;
}

bool is_large_step(size_t count) {
  constexpr size_t kArrays = 4;  // of floats: gradients, two moments, and parameters or masters
  return count * kArrays * sizeof(float) > last_level_cache();
}

const AdamKernels* adam_kernels_for(const char* isa) {
  if (kernels_for(isa) == nullptr) return nullptr;
#ifdef __x86_64__
  if (std::strcmp(isa, "avx512") == 0) return &kAvx512Adam;
  if (std::strcmp(isa, "avx2") == 0) return &kAvx2Adam;
#endif
  return &kBaselineAdam;
}

}  // namespace pycoll::cpu
