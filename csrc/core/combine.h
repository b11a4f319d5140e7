// Reduce several sources into one result and store it in several places: the one inner loop of all collectives.
//
// `CombineArgs` is what every device's implementation takes; `combine_strided` is the portable one, for CUDA blocks and for host threads
// that stand in for a block. The CPU's own loops (cpu/kernels.h) give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycoll {

// dst[j][i] = convert(src[0][i] op src[1][i] op ...), in that order, for all j and i.
// A destination may be a source (same address, elements of the same size); otherwise they do not overlap, nor do two destinations.
struct CombineArgs {
  void* const* dst;
  int dst_count;  // at least 1
  const void* const* src;
  int src_count;          // at least 1; with 1 it copies, casts up to accumulators, or finalizes
  uint32_t wire_sources;  // bit k: src[k] holds accumulators (fp32 for 16-bit types), not elements; sources past 31 hold elements
  bool final;             // true: the result is finalized, rounded once and stored as elements; false: stored as accumulators
  int world;              // what a finalized average is divided by
  size_t count;           // elements

  PYCOLL_HD bool is_wire(int k) const { return k < 32 && (wire_sources >> k & 1) != 0; }
};

namespace strided {

constexpr size_t kVectorBytes = 16;

// On the host an element may have any address; a GPU demands that elements are aligned.
template <class T>
#ifdef __CUDA_ARCH__
constexpr size_t kElementAlignment = alignof(T);
#else
constexpr size_t kElementAlignment = 1;
#endif

// N values of type T that lie in memory as S, aligned to kAlign bytes.
template <class S, size_t kAlign, size_t N>
struct Pack {
  static constexpr size_t kAlignment = kAlign < sizeof(S) * N ? kAlign : sizeof(S) * N;

  PYCOLL_HD static void load(S (&values)[N], const void* base, size_t index) {
    __builtin_memcpy(values, __builtin_assume_aligned(static_cast<const S*>(base) + index, kAlignment), sizeof values);
  }
  PYCOLL_HD static void store(void* base, size_t index, const S (&values)[N]) {
    __builtin_memcpy(__builtin_assume_aligned(static_cast<S*>(base) + index, kAlignment), values, sizeof values);
  }
};

}  // namespace strided
}  // namespace pycoll
