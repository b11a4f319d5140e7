// Reduce several sources into one result and store it in several places: the one inner loop of all collectives.
//
// `CombineArgs` is what every device's implementation takes; `combine_strided` is the portable one, for CUDA blocks and
// for host threads that stand in for a block. The CPU's own loops (cpu/kernels.h) give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycoll {

// dst[j][i] = convert(src[0][i] op src[1][i] op ...), in that order, for all j and i.
// A destination may be a source (same address, elements of the same size); otherwise they do not overlap, nor do two
// destinations.
struct CombineArgs {
  void* const* dst;
  int dst_count;  // at least 1
  const void* const* src;
  int src_count;          // at least 1; with 1 it copies, casts up to accumulators, or finalizes
  uint32_t wire_sources;  // bit k: src[k] holds accumulators (fp32 for 16-bit types), not elements; sources past 31
                          // hold elements
  bool final;    // true: the result is finalized, rounded once and stored as elements; false: stored as accumulators
  int world;     // what a finalized average is divided by
  size_t count;  // elements

  PYCOLL_HD bool is_wire(int k) const { return k < 32 && (wire_sources >> k & 1) != 0; }
};

namespace strided {

constexpr size_t kVectorBytes = 16;

// Elements a thread takes at once.
template <class T>
constexpr size_t kVector = kVectorBytes / sizeof(T);

// Vectors of a source that a thread asks for at once: many for what gradients and activations are made of; for others,
// which are rarely large, that is not worth the time to compile it.
template <class T>
constexpr int kInFlight = kWidens<T> || std::is_same_v<T, float> ? 4 : 1;

// What a single element may assume: nothing on the host; a GPU demands that it is aligned.
#ifdef __CUDA_ARCH__
template <class S>
constexpr size_t kElementAlignment = alignof(S);
#else
template <class S>
constexpr size_t kElementAlignment = 1;
#endif

template <class S, size_t N>
constexpr size_t kAlignment = N > 1 ? kVectorBytes : kElementAlignment<S>;

template <class S, size_t N>
PYCOLL_HD void load(S (&values)[N], const void* base, size_t index) {
  const void* from = static_cast<const std::byte*>(base) + index * sizeof(S);
  __builtin_memcpy(values, __builtin_assume_aligned(from, kAlignment<S, N>), sizeof values);
}

template <class S, size_t N>
PYCOLL_HD void store(void* base, size_t index, const S (&values)[N]) {
  void* to = static_cast<std::byte*>(base) + index * sizeof(S);
  __builtin_memcpy(__builtin_assume_aligned(to, kAlignment<S, N>), values, sizeof values);
}

template <class T, size_t N>
PYCOLL_HD void load_source(Accumulator<T> (&values)[N], const CombineArgs& a, int k, size_t index) {
  if (!kWidens<T> || a.is_wire(k)) return load(values, a.src[k], index);
  T elements[N];
  load(elements, a.src[k], index);
  for (size_t j = 0; j < N; ++j) values[j] = widen(elements[j]);
}

// `Count` times N elements, `step` elements apart: all loads of a source are on their way before the first is needed.
template <class T, ReduceOp Op, size_t N, int Count>
PYCOLL_HD void combine_at(const CombineArgs& a, size_t index, size_t step) {
  constexpr Reduce<Op> kReduce;
  Accumulator<T> sum[Count][N];
  for (int c = 0; c < Count; ++c) load_source<T>(sum[c], a, 0, index + c * step);
  for (int k = 1; k < a.src_count; ++k) {
    Accumulator<T> next[Count][N];
    for (int c = 0; c < Count; ++c) load_source<T>(next[c], a, k, index + c * step);
    for (int c = 0; c < Count; ++c) {
      for (size_t j = 0; j < N; ++j) sum[c][j] = kReduce(sum[c][j], next[c][j]);
    }
  }
  for (int c = 0; c < Count; ++c) {
    if (!a.final) {
      for (int d = 0; d < a.dst_count; ++d) store(a.dst[d], index + c * step, sum[c]);
      continue;
    }
    T result[N];
    for (size_t j = 0; j < N; ++j) result[j] = narrow<T>(kReduce.finalize(sum[c][j], a.world));
    for (int d = 0; d < a.dst_count; ++d) store(a.dst[d], index + c * step, result);
  }
}

template <class T>
PYCOLL_HD bool all_aligned(const CombineArgs& a, size_t index) {
  const auto aligned = [&](const void* p, bool wire) {
    return (reinterpret_cast<uintptr_t>(p) + index * (wire ? sizeof(Accumulator<T>) : sizeof(T))) % kVectorBytes == 0;
  };
  for (int d = 0; d < a.dst_count; ++d) {
    if (!aligned(a.dst[d], !a.final)) return false;
  }
  for (int k = 0; k < a.src_count; ++k) {
    if (!aligned(a.src[k], a.is_wire(k))) return false;
  }
  return true;
}

}  // namespace strided

// 8 bytes of elements of each of `count` ranks, reduced in order and finalized.
template <class T, ReduceOp Op>
PYCOLL_HD uint64_t reduce_unit(const uint64_t* units, int count) {
  constexpr Reduce<Op> kReduce;
  constexpr size_t kN = sizeof(uint64_t) / sizeof(T);
  T elements[kN];
  Accumulator<T> sum[kN];
  __builtin_memcpy(elements, &units[0], sizeof elements);
  for (size_t j = 0; j < kN; ++j) sum[j] = widen(elements[j]);
  for (int k = 1; k < count; ++k) {
    __builtin_memcpy(elements, &units[k], sizeof elements);
    for (size_t j = 0; j < kN; ++j) sum[j] = kReduce(sum[j], widen(elements[j]));
  }
  for (size_t j = 0; j < kN; ++j) elements[j] = narrow<T>(kReduce.finalize(sum[j], count));
  uint64_t result;
  __builtin_memcpy(&result, elements, sizeof result);
  return result;
}

// The share of thread g.thread() of the g.size() threads that call this together: 16-byte vectors from the first
// element on at which all pointers are aligned, single elements before and after, or everywhere where they never are.
template <class T, ReduceOp Op, class Group>
PYCOLL_HD void combine_strided(const Group& g, const CombineArgs& a) {
  constexpr size_t kN = strided::kVector<T>;
  size_t head = 0;
  while (head < kN && !strided::all_aligned<T>(a, head)) ++head;
  const size_t vectors = head < kN && head < a.count ? (a.count - head) / kN : 0;
  if (vectors == 0) head = 0;
  const size_t thread = g.thread(), threads = g.size();
  size_t v = thread;
  for (; v + (strided::kInFlight<T> - 1) * threads < vectors; v += strided::kInFlight<T> * threads) {
    strided::combine_at<T, Op, kN, strided::kInFlight<T>>(a, head + v * kN, threads * kN);
  }
  for (; v < vectors; v += threads) strided::combine_at<T, Op, kN, 1>(a, head + v * kN, 0);
  for (size_t i = thread; i < a.count - vectors * kN; i += threads) {
    strided::combine_at<T, Op, 1, 1>(a, i < head ? i : i + vectors * kN, 0);
  }
}

}  // namespace pycoll
