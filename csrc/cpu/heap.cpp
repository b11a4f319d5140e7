#include "cpu/heap.h"

#include <algorithm>
#include <string>

#include "core/record.h"
#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

namespace {
constexpr size_t kLine = 128, kPage = 4096, kHuge = size_t{2} << 20;

size_t align(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
size_t alignment_for(size_t bytes) { return bytes >= kHuge ? kHuge : bytes >= kPage ? kPage : kLine; }
}  // namespace

Heap::Heap(std::byte* base, size_t bytes) : base_(base), size_(bytes), blocks_(bytes) {}

std::byte* Heap::allocate(size_t bytes) {
  const size_t need = align(std::max<size_t>(bytes, 1), kLine);
  std::optional<size_t> taken;
  {
    const std::lock_guard guard(lock_);
    taken = blocks_.take(need, alignment_for(bytes));
    if (!taken) {
      throw Error(ErrorKind::kError, "pycoll: the shared heap has no room for " + std::to_string(bytes) + " bytes (" +
                                         std::to_string(blocks_.used()) + " of " + std::to_string(size_) +
                                         " in use): free tensors, or raise Config.heap_bytes");
    }
  }
  const size_t offset = *taken;
  try {
    prefault(base_ + offset, need);
  } catch (...) {
    free(base_ + offset);
    throw;
  }
  return base_ + offset;
}

void Heap::free(std::byte* block) {
  const std::lock_guard guard(lock_);
  const auto [freed, free] = blocks_.give_back(static_cast<size_t>(block - base_));
  // The pages this block shared with free neighbours are free as a whole now.
  const size_t first = std::max(free.begin, freed.begin / kPage * kPage);
  const size_t last = std::min(free.end, align(freed.end, kPage));
  release_pages(base_ + first, last - first);
}

uint64_t Heap::offset_of(const void* p, size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(p);
  if (begin < base_ || begin >= base_ + size_ || static_cast<size_t>(base_ + size_ - begin) < bytes) return kNotMapped;
  return static_cast<uint64_t>(begin - base_);
}

size_t Heap::used() const {
  const std::lock_guard guard(lock_);
  return blocks_.used();
}

}  // namespace pycoll::cpu
