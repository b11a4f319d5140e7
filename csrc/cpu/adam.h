// Adam and AdamW on the CPU, and the sums of squares that gradients are clipped by: compiled for several instruction
// sets, which give the same bits; core/adam_math.h is what an element goes through.
//
// A sharded optimizer names the gradients of all ranks, whose average is taken where it is used, and the parameter's
// place on each rank. Any cutting gives the same bits, as long as `first` says where a piece begins.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/adam_math.h"
#include "core/dtype.h"

namespace pycoll::cpu {

constexpr size_t kAdamBlock = 1024;  // elements whose squares are summed, and the grain of dividing work by threads
constexpr int kMostGrads = 4;        // that one loop averages

// Elements `first` to `first + count` of a tensor. Any address is allowed, aligned or not. What is written overlaps
// nothing else, but a dst may be `param`; dst[0] and `master` are read again while their block is in the cache.
struct AdamArgs {
  const void* param;         // the old value. Not read, and may be null, where there is a master
  float* master;             // the fp32 value that a 16-bit parameter is the rounding of, or null
  void* const* dst;          // [dst_count] where the new value goes, in the parameter's dtype
  int dst_count;             // at least 1
  const void* const* grads;  // [grad_count] averaged in their order, in fp32
  int grad_count;            // 1 to kMostGrads
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;  // null: no AMSGrad
  size_t count;
  uint64_t first;   // index of the first element, for the random numbers
  bool stochastic;  // 16-bit results are rounded at random, else to the nearest
  AdamScalars scalars;
  // What is written without having been read, other ranks' parameters and 16-bit ones that have a master, goes past the
  // caches; whoever announces it calls kernels().drain().
  bool streams = false;
};

// Whether the caches are too small for what a step of so many elements reads and writes.
bool is_large_step(size_t count);

// What one instruction set offers; null where a dtype is neither float32 nor a 16-bit float.
struct AdamKernels {
  void (*update[kDTypeCount][kDTypeCount])(const AdamArgs&);  // [the parameter's dtype][the gradient's]
  // The sum of the squares of the average of 1 to kMostGrads arrays of the dtype, in fp64: not finite if and only if an
  // element of the average is not. `average`: where that goes, if not null; may be one of the arrays.
  double (*measure[kDTypeCount])(float* average, const void* const* arrays, int count, size_t n);
};

// Those of kernels().isa.
const AdamKernels& adam_kernels();

// Those of one instruction set, as kernels_for().
const AdamKernels* adam_kernels_for(const char* isa);

}  // namespace pycoll::cpu
