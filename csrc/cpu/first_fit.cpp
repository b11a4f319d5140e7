#include "cpu/first_fit.h"

#include <algorithm>
#include <iterator>

namespace pycoll::cpu {

namespace {
size_t align(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
}  // namespace

void FirstFit::extend(size_t bytes) {
  if (bytes == 0) return;
  merge({size_, size_ + bytes});
  size_ += bytes;
}

std::optional<size_t> FirstFit::take(size_t bytes, size_t alignment) {
  const auto fits = std::find_if(free_.begin(), free_.end(), [&](const auto& block) {
    return align(block.first, alignment) - block.first + bytes <= block.second;
  });
  if (fits == free_.end()) return std::nullopt;
  const auto [start, length] = *fits;
  const size_t offset = align(start, alignment);
  free_.erase(fits);
  if (offset > start) free_[start] = offset - start;
  if (start + length > offset + bytes) free_[offset + bytes] = start + length - offset - bytes;
  used_[offset] = bytes;
  used_bytes_ += bytes;
  return offset;
}

FirstFit::Freed FirstFit::give_back(size_t offset) {
  const auto it = used_.find(offset);
  const Part block{offset, offset + it->second};
  used_bytes_ -= it->second;
  used_.erase(it);
  return {block, merge(block)};
}

FirstFit::Part FirstFit::merge(Part part) {
  const auto next = free_.lower_bound(part.begin);
  if (next != free_.end() && next->first == part.end) part.end = next->first + next->second;
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == part.begin) part.begin = previous->first;
  }
  free_.erase(free_.lower_bound(part.begin), free_.lower_bound(part.end));
  free_[part.begin] = part.end - part.begin;
  return part;
}

}  // namespace pycoll::cpu
