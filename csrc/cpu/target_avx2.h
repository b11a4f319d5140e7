// Everything after this line is compiled for x86-64 with AVX2 and F16C: to be included after all other headers, whose
// definitions must stay code for the baseline, by a file that holds loops for this instruction set and nothing else.
// What is included after it is in an unnamed namespace, and what is called there is always inlined: no code built for
// this instruction set gets out of that file. It defines
//   kIsa      the name of the instruction set
//   Halves    its instructions that convert Float16: how many they take at once, 0 where it has none; widen and narrow
//   Streams   its stores that go past the caches: how many bytes each takes, 0 where it has none; store, to an aligned
//             address; and drain, after which they come before whatever is stored next
//   kCopyLoopFrom, kCopyLoopTo   the sizes in bytes at which a plain loop copies faster than memcpy (measured in the L1
//   cache)
#pragma once

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC optimize("O3,no-math-errno")  // vectorizes, whatever the build asks for
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
  PYCOLL_HD static void narrow(void* to, const void* from) {
    _mm_storeu_si128(static_cast<__m128i*>(to),
                     _mm256_cvtps_ph(_mm256_loadu_ps(static_cast<const float*>(from)), _MM_FROUND_TO_NEAREST_INT));
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
