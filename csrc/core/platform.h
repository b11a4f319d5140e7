// What a function of core and algorithms carries so that one source serves g++, clang and nvcc.
#pragma once

// Always inlined, never a symbol of its own: these headers are compiled for several instruction sets, and the linker
// keeps one copy of an inline function, so an AVX-512 copy could otherwise end up in code that runs on a machine
// without it. nvcc compiles for no such set, and decides better by itself what is worth a copy in every kernel.
#ifdef __CUDACC__
#define PYCOLL_HD __host__ __device__ inline
#else
#define PYCOLL_HD inline __attribute__((always_inline))
#endif
