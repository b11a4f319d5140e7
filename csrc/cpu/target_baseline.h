// Everything after this line is compiled for any CPU of the architecture, SSE2 on x86-64: to be included after all
// other headers, whose definitions must stay code for the baseline, by a file that holds loops for this instruction
// set and nothing else.
// What is included after it is in an unnamed namespace, and what is called there is always inlined: no code built for
// this instruction set gets out of that file. It defines
//   kIsa      the name of the instruction set
//   Halves    its instructions that convert Float16: how many they take at once, 0 where it has none; widen and narrow
//   Streams   its stores that go past the caches: how many bytes each takes, 0 where it has none; store, to an aligned
//             address; and drain, after which they come before whatever is stored next
//   kCopyLoopFrom, kCopyLoopTo   the sizes in bytes at which a plain loop copies faster than memcpy (measured in the L1
//   cache)
#pragma once

#ifndef __clang__
#pragma GCC optimize("O3,no-math-errno")  // vectorizes, whatever the build asks for
#endif

namespace pycoll::cpu {
namespace {

constexpr const char* kIsa = "baseline";
constexpr size_t kCopyLoopFrom = 1, kCopyLoopTo = 0;  // never: memcpy is faster
struct Halves {
  static constexpr size_t kVector = 0;
  static void widen(float*, const void*);
  static void narrow(void*, const void*);
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
  static void drain() {}
#endif
};

}  // namespace
}  // namespace pycoll::cpu
