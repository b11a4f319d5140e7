// The shared heap of a rank: first-fit allocation within its segment, so that peers reach user tensors where they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "cpu/first_fit.h"

namespace pycoll::cpu {

class Heap {
 public:
  Heap(std::byte* base, size_t bytes);

  // `bytes` of prefaulted memory, aligned to a page from 4 KiB on and to 128 bytes below. Throws Error when the heap is
  // full.
  std::byte* allocate(size_t bytes);
  void free(std::byte* block);  // gives the pages back to the system

  // Where [p, p + bytes) lies in the heap, or kNotMapped.
  uint64_t offset_of(const void* p, size_t bytes) const;
  size_t used() const;  // bytes

 private:
  std::byte* const base_;
  const size_t size_;
  mutable std::mutex lock_;
  FirstFit blocks_;
};

}  // namespace pycoll::cpu
