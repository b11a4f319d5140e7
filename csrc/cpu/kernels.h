// The CPU's inner loops: reductions of every dtype and op, and copies, compiled for several instruction sets; the best
// one is chosen at run time.
#pragma once

#include <cstddef>

#include "core/combine.h"
#include "core/wire.h"

namespace pycoll::cpu {

// What one instruction set offers. All instruction sets give the same bits.
struct Kernels {
  void (*combine[kDTypeCount][kReduceOpCount])(const CombineArgs&);  // any address, aligned or not; null: see kReduces
  void (*copy)(void* dst, const void* src, size_t bytes);            // the two do not overlap
  void (*stream)(void* dst, const void* src, size_t bytes);          // the same, past the caches
  void (*drain)();  // what this thread has streamed comes before what it writes from now on
  // A block of kScaleBlock floats, each plus its `residual`, as 8 bits; the residual becomes what rounding has taken. Where
  // a value is not finite the scale is NaN, and the residual stays. `residual`: may be null.
  void (*quantize)(const void* values, float* residual, int8_t* elements, float* scale);
  void (*dequantize)(const Int8Unit& unit, float* to);
  const char* isa;  // "baseline", "avx2" or "avx512"
};

// The best that this CPU has, or what the environment variable PYCOLL_SIMD names. Throws std::invalid_argument where
// that is unknown or this CPU lacks it.
const Kernels& kernels();

// Those of one instruction set; null where it is unknown, or this CPU or this build lacks it.
const Kernels* kernels_for(const char* isa);

}  // namespace pycoll::cpu
