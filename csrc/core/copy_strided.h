// Bytes from one place to another, by threads that share the work: the portable loop, for CUDA blocks and for host
// threads that stand in for one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/partition.h"

namespace pycoll {

namespace strided {

// Bytes of the longest word that can be aligned at both places.
PYCOLL_HD size_t longest_word(const void* a, const void* b) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b);
  size_t bytes = 16;
  while (apart % bytes != 0) bytes /= 2;
  return bytes;
}

// `Count` words of N parts, `step` bytes apart: all loads are on their way before the first store, which might be to where
// another one reads, for all that a compiler knows.
template <class Part, size_t N, int Count>
PYCOLL_HD void copy_at(std::byte* to, const std::byte* from, size_t step) {
  constexpr size_t kBytes = N * sizeof(Part);
  Part words[Count][N], word[N];  // part by part: where arrays are copied whole, nvcc stores them in memory as well
  for (int c = 0; c < Count; ++c) {
    __builtin_memcpy(word, __builtin_assume_aligned(from + c * step, kBytes), kBytes);
    for (size_t j = 0; j < N; ++j) words[c][j] = word[j];
  }
  for (int c = 0; c < Count; ++c) {
    for (size_t j = 0; j < N; ++j) word[j] = words[c][j];
    __builtin_memcpy(__builtin_assume_aligned(to + c * step, kBytes), word, kBytes);
  }
}

// Of `words` words the one at `w` and every `threads`-th after it: as many at once as are left, but at most `Count`.
template <class Part, size_t N, int Count>
PYCOLL_HD void copy_words(std::byte* to, const std::byte* from, size_t w, size_t words, size_t threads) {
  constexpr size_t kBytes = N * sizeof(Part);
  for (; w + (Count - 1) * threads < words; w += Count * threads) {
    copy_at<Part, N, Count>(to + w * kBytes, from + w * kBytes, threads * kBytes);
  }
  if constexpr (Count > 1) copy_words<Part, N, Count / 2>(to, from, w, words, threads);
}

// Words from the first byte on at which they are aligned, at both ends; single bytes before and after.
template <class Part, size_t N = 1, class Group>
PYCOLL_HD void copy_in(const Group& g, std::byte* to, const std::byte* from, size_t bytes) {
  constexpr size_t kBytes = N * sizeof(Part);
  constexpr int kInFlight = 8;
  const size_t head = smaller(-reinterpret_cast<uintptr_t>(to) % kBytes, bytes);
  const size_t words = (bytes - head) / kBytes;
  copy_words<Part, N, kInFlight>(to + head, from + head, g.thread(), words, g.size());
  for (size_t i = g.thread(); i < bytes - words * kBytes; i += g.size()) {
    const size_t at = i < head ? i : i + words * kBytes;
    to[at] = from[at];
  }
}

}  // namespace strided

// The share of thread g.thread() of the g.size() threads that call this together, in the longest words that can be
// aligned at both ends. These are the same, or do not overlap.
template <class Group>
PYCOLL_HD void copy_strided(const Group& g, void* dst, const void* src, size_t bytes) {
  auto* const to = static_cast<std::byte*>(dst);
  const auto* const from = static_cast<const std::byte*>(src);
  switch (strided::longest_word(to, from)) {
    case 16:
      return strided::copy_in<uint32_t, 4>(g, to, from, bytes);
    case 8:
      return strided::copy_in<uint64_t>(g, to, from, bytes);
    case 4:
      return strided::copy_in<uint32_t>(g, to, from, bytes);
    case 2:
      return strided::copy_in<uint16_t>(g, to, from, bytes);
    default:
      return strided::copy_in<uint8_t>(g, to, from, bytes);
  }
}

}  // namespace pycoll
