// The inner loops on a GPU: the shared ones of core/combine.h for every dtype and operation, that of core/copy_strided.h,
// and those of the switch.
#pragma once

#include "core/combine.h"
#include "core/copy_strided.h"
#include "core/dtype.h"

namespace pycoll::cuda_device {

// The threads that share a loop: a block's, or a whole grid's.
struct Threads {
  size_t index, count;
  __device__ size_t thread() const { return index; }
  __device__ size_t size() const { return count; }
};

// One function a dtype and operation. Not inlined: a kernel that calls them holds every algorithm once, for all of them.
template <class T, ReduceOp Op>
static __device__ __noinline__ void combine_loop(const Threads& threads, const CombineArgs& args) {
  combine_strided<T, Op>(threads, args);
}
template <class T, ReduceOp Op>
static __device__ __noinline__ uint64_t reduce_unit_of(const uint64_t* units, int count) {
  return reduce_unit<T, Op>(units, count);
}

// f(TypeTag<T>{}, the operation as a constant).
template <class F>
__device__ auto dispatch(DType dtype, ReduceOp op, const F& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    return dispatch_op<typename decltype(tag)::type>(op, [&](auto op_constant) { return f(tag, op_constant); });
  });
}

static __device__ __noinline__ void combine(const Threads& threads, DType dtype, ReduceOp op, const CombineArgs& args) {
  dispatch(dtype, op, [&](auto tag, auto op_constant) {
    combine_loop<typename decltype(tag)::type, decltype(op_constant)::value>(threads, args);
  });
}

static __device__ __noinline__ void copy(const Threads& threads, void* dst, const void* src, size_t bytes) {
  copy_strided(threads, dst, src, bytes);
}

static __device__ __noinline__ uint64_t reduce_units(DType dtype, ReduceOp op, const uint64_t* units, int count) {
  return dispatch(dtype, op, [&](auto tag, auto op_constant) {
    return reduce_unit_of<typename decltype(tag)::type, decltype(op_constant)::value>(units, count);
  });
}

// The sum of `count` elements at a multicast address over all GPUs behind it, written to all of them. fp32, fp16 and
// bf16 only. Whole vectors: what lies after the last element, in the same slot, is summed too and read by nobody.
static __device__ __noinline__ void reduce_in_switch([[maybe_unused]] const Threads& threads,
                                                     [[maybe_unused]] DType dtype,
                                                     [[maybe_unused]] std::byte* multicast,
                                                     [[maybe_unused]] size_t count) {
#if __CUDA_ARCH__ >= 900
  // The slots were written, and are read, by their own addresses: other names of what the switch sees.
  asm volatile("fence.proxy.alias;" ::: "memory");
  const size_t vectors = (count * size_of(dtype) + 15) / 16;
  for (size_t v = threads.index; v < vectors; v += threads.count) {
    std::byte* at = multicast + v * 16;
    uint32_t a, b, c, d;
    if (dtype == DType::kFloat32) {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                   : "l"(at)
                   : "memory");
    } else if (dtype == DType::kFloat16) {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                   : "l"(at)
                   : "memory");
    } else {
      asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                   : "l"(at)
                   : "memory");
    }
    asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};"
                 :
                 : "l"(at), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
  }
  asm volatile("fence.proxy.alias;" ::: "memory");
#endif
}

}  // namespace pycoll::cuda_device
