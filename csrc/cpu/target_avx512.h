// Everything after this line is compiled for x86-64 with AVX-512 F, BW, DQ and VL: to be included after all other
// headers, whose definitions must stay code for the baseline, by a file that holds loops for this instruction set
// and nothing else.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512))), \
                             apply_to = function)
#else
#pragma GCC optimize("O3,no-math-errno,no-tree-loop-distribute-patterns")  // the latter: a loop that copies stays one
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

namespace pycoll::cpu {
namespace {

constexpr const char* kIsa = "avx512";
constexpr size_t kCopyLoopFrom = 256, kCopyLoopTo = 16384;
struct Halves {
  static constexpr size_t kVector = 16;
  PYCOLL_HD static void widen(float* to, const void* from) {
    _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
  }
  PYCOLL_HD static void narrow(void* to, const void* from) {
    _mm256_storeu_si256(
        static_cast<__m256i*>(to),
        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(static_cast<const float*>(from)), _MM_FROUND_TO_NEAREST_INT));
  }
};
struct Streams {
  static constexpr size_t kBytes = 64;
  PYCOLL_HD static void store(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  PYCOLL_HD static void drain() { _mm_sfence(); }
};

}  // namespace
}  // namespace pycoll::cpu
