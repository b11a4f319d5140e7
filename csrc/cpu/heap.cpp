#include "cpu/heap.h"

#include <algorithm>
#include <iterator>
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

Heap::Heap(std::byte* base, size_t bytes) : base_(base), size_(bytes) {
  if (bytes > 0) free_[0] = bytes;
}

std::byte* Heap::allocate(size_t bytes) {
  const size_t unit = alignment_for(bytes);
  const size_t need = align(std::max<size_t>(bytes, 1), kLine);
  size_t offset = 0;
  {
    const std::lock_guard guard(lock_);
    const auto fits = std::find_if(free_.begin(), free_.end(), [&](const auto& block) {
      return align(block.first, unit) - block.first + need <= block.second;
    });
    if (fits == free_.end()) {
      throw Error(ErrorKind::kError, "pycoll: the shared heap has no room for " + std::to_string(bytes) + " bytes (" +
                                         std::to_string(used_bytes_) + " of " + std::to_string(size_) +
                                         " in use): free tensors, or raise Config.heap_bytes");
    }
    const auto [start, length] = *fits;
    offset = align(start, unit);
    free_.erase(fits);
    if (offset > start) free_[start] = offset - start;
    if (start + length > offset + need) free_[offset + need] = start + length - offset - need;
    used_[offset] = need;
    used_bytes_ += need;
  }
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
  const auto it = used_.find(static_cast<size_t>(block - base_));
  const auto [offset, bytes] = *it;
  size_t begin = offset, end = offset + bytes;
  used_bytes_ -= bytes;
  used_.erase(it);
  const auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == end) end = next->first + next->second;
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) begin = previous->first;
  }
  free_.erase(free_.lower_bound(begin), free_.lower_bound(end));
  free_[begin] = end - begin;
  // The pages this block shared with free neighbours are free as a whole now.
  const size_t first = std::max(begin, offset / kPage * kPage), last = std::min(end, align(offset + bytes, kPage));
  release_pages(base_ + first, last - first);
}

uint64_t Heap::offset_of(const void* p, size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(p);
  if (begin < base_ || begin >= base_ + size_ || static_cast<size_t>(base_ + size_ - begin) < bytes) return kNotMapped;
  return static_cast<uint64_t>(begin - base_);
}

size_t Heap::used() const {
  const std::lock_guard guard(lock_);
  return used_bytes_;
}

}  // namespace pycoll::cpu
