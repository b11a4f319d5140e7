// What all loops of cpu/kernels.h and cpu/adam.h work with: the size of a block, elements at any address, conversions,
// copies. Included once per instruction set, after its target_*.h, which says what holds for such files.
#pragma once

namespace pycoll::cpu {
namespace {

// The block that all destinations get before the next one is looked at: it, its sources and the local buffers stay in
// the L1 cache.
constexpr size_t kBlockBytes = 4096;
template <class T>
constexpr size_t kBlock = kBlockBytes / sizeof(Accumulator<T>);

constexpr int kFanIn = 4;  // sources that one loop reads

// Any address is allowed, so no pointer to T is ever formed.
template <class S>
PYCOLL_HD S load(const void* base, size_t i) {
  S value;
  __builtin_memcpy(&value, static_cast<const std::byte*>(base) + i * sizeof(S), sizeof(S));
  return value;
}

template <class S>
PYCOLL_HD void store(void* base, size_t i, S value) {
  __builtin_memcpy(static_cast<std::byte*>(base) + i * sizeof(S), &value, sizeof(S));
}

// Calls f with the first `count` of `sources`, 1 to kFanIn of them, as arguments.
template <class F>
PYCOLL_HD void with_sources(const void* const* sources, int count, F f) {
  switch (count) {
    case 1:
      return f(sources[0]);
    case 2:
      return f(sources[0], sources[1]);
    case 3:
      return f(sources[0], sources[1], sources[2]);
    case kFanIn:
      return f(sources[0], sources[1], sources[2], sources[3]);
  }
}

// Converting BFloat16 takes so few instructions that any loop does it. Float16 is converted block by block, in loops of
// its own, into what other loops read.
template <class T>
constexpr bool kConvertsInLoop = !std::is_same_v<T, Float16>;

template <class T>
void widen_block(float* to, const void* from, size_t n) {
  size_t i = 0;
  if constexpr (Halves::kVector > 0 && std::is_same_v<T, Float16>) {
    for (; i + Halves::kVector <= n; i += Halves::kVector)
      Halves::widen(to + i, static_cast<const std::byte*>(from) + i * sizeof(T));
  }
  PYCOLL_INDEPENDENT
  for (; i < n; ++i) to[i] = load<T>(from, i).to_float();
}

template <class T>
void narrow_block(void* to, const void* from, size_t n) {  // from floats
  size_t i = 0;
  if constexpr (Halves::kVector > 0 && std::is_same_v<T, Float16>) {
    for (; i + Halves::kVector <= n; i += Halves::kVector)
      Halves::narrow(static_cast<std::byte*>(to) + i * sizeof(T),
                     static_cast<const std::byte*>(from) + i * sizeof(float));
  }
  PYCOLL_INDEPENDENT
  for (; i < n; ++i) store(to, i, T::from_float(load<float>(from, i)));
}

void copy(void* dst, const void* src, size_t bytes) {
  size_t words = 0;
  if (bytes >= kCopyLoopFrom && bytes <= kCopyLoopTo && reinterpret_cast<uintptr_t>(dst) % 64 == 0) {
    words = bytes / 64 * 8;
    PYCOLL_INDEPENDENT
    for (size_t i = 0; i < words; ++i) store(dst, i, load<uint64_t>(src, i));
  }
  const size_t done = words * sizeof(uint64_t);
  if (done == bytes) return;  // memcpy takes no null pointer, even with no bytes
  __builtin_memcpy(static_cast<std::byte*>(dst) + done, static_cast<const std::byte*>(src) + done, bytes - done);
}

// Whoever announces what it has written drains first.
void stream(void* dst, const void* src, size_t bytes) {
  size_t begin = 0, end = 0;  // of whole lines: written in part they cost more than they save
  if constexpr (Streams::kBytes > 0) {
    begin = -reinterpret_cast<uintptr_t>(dst) % 64;
    if (begin > bytes) begin = 0;
    end = bytes - (bytes - begin) % 64;
    for (size_t i = begin; i < end; i += Streams::kBytes) {
      Streams::store(static_cast<std::byte*>(dst) + i, static_cast<const std::byte*>(src) + i);
    }
  }
  copy(dst, src, begin);
  copy(static_cast<std::byte*>(dst) + end, static_cast<const std::byte*>(src) + end, bytes - end);
}

}  // namespace
}  // namespace pycoll::cpu
