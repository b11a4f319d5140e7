// The choice of the instruction set.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels_isa.h"

namespace pycoll::cpu {
namespace {

struct Build {
  const Kernels* kernels;
  bool supported;
};

// Best first.
const auto& builds() {
#ifdef __x86_64__
  static const Build kBuilds[] = {
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
      {&kBaselineKernels, true},
  };
#else
  static const Build kBuilds[] = {{&kBaselineKernels, true}};
#endif
  return kBuilds;
}

const Kernels& choose() {
  const char* const wanted = std::getenv("PYCOLL_SIMD");
  std::string possible;
  for (const Build& build : builds()) {
    if (!build.supported) continue;
    if (wanted == nullptr || std::strcmp(wanted, build.kernels->isa) == 0) return *build.kernels;
    possible += (possible.empty() ? "" : ", ") + std::string(build.kernels->isa);
  }
  throw std::invalid_argument("PYCOLL_SIMD=" + std::string(wanted) +
                              " is not available here; unset it or set it to one of: " + possible);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels* kernels_for(const char* isa) {
  for (const Build& build : builds()) {
    if (build.supported && std::strcmp(isa, build.kernels->isa) == 0) return build.kernels;
  }
  return nullptr;
}

}  // namespace pycoll::cpu
