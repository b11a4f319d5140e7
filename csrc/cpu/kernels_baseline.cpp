// The kernels for any CPU of the architecture: SSE2 on x86-64.
#ifdef __x86_64__
#include <emmintrin.h>
#endif

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
struct Streams {
#ifdef __x86_64__
  static constexpr size_t kBytes = 16;
  PYCOLL_HD static void store(void* to, const void* from) {
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
  }
  PYCOLL_HD static void drain() { _mm_sfence(); }
#else
  static constexpr size_t kBytes = 0;
  static void store(void*, const void*);
  static void drain();
#endif
};

}  // namespace
}  // namespace pycoll::cpu

#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kBaselineKernels = make_table();
}  // namespace pycoll::cpu
