// The kernels for x86-64 with AVX2 and F16C.
#ifdef __x86_64__

#include <immintrin.h>

#include "cpu/kernels_isa.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC optimize("O3")  // vectorizes, whatever the build asks for
#pragma GCC target("avx2,f16c")
#endif

namespace pycoll::cpu {
namespace {

constexpr const char* kIsa = "avx2";
constexpr size_t kCopyLoopFrom = 1, kCopyLoopTo = 0;  // never: memcpy is faster
struct Halves {
  static constexpr size_t kVector = 8;
  PYCOLL_HD static void widen(float* to, const void* from) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
  PYCOLL_HD static void narrow(void* to, const float* from) {
    _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
};
struct Streams {
  static constexpr size_t kBytes = 32;
  PYCOLL_HD static void store(void* to, const void* from) {
    _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
  PYCOLL_HD static void drain() { _mm_sfence(); }
};

}  // namespace
}  // namespace pycoll::cpu

#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kAvx2Kernels = make_table();
}  // namespace pycoll::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
