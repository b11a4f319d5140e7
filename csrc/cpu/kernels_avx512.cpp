// The kernels for x86-64 with AVX-512 F, BW, DQ and VL, in vectors of 512 bits.
#ifdef __x86_64__

#include <immintrin.h>

#include "cpu/kernels_isa.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512))), \
                             apply_to = function)
#else
#pragma GCC optimize("O3,no-tree-loop-distribute-patterns")  // the latter: a loop that copies stays one
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
  PYCOLL_HD static void narrow(void* to, const float* from) {
    _mm256_storeu_si256(static_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
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

#include "cpu/kernels_body.h"

namespace pycoll::cpu {
constinit const Kernels kAvx512Kernels = make_table();
}  // namespace pycoll::cpu

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
