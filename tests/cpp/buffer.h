// Memory for the C++ tests of loops: at any distance from alignment, with guards that tell of writes outside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

using Bytes = std::vector<std::byte>;

// Bytes at a chosen distance from a 64-byte boundary, with guards on both sides.
class Buffer {
 public:
  Buffer(size_t bytes, size_t shift) : bytes_(bytes), storage_(bytes + 4 * kGuard, kMark) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    begin_ = kGuard + (64 - address % 64) % 64 + shift;
  }
  Buffer(const Bytes& content, size_t shift) : Buffer(content.size(), shift) {
    if (!content.empty()) std::memcpy(data(), content.data(), content.size());
  }
  std::byte* data() { return storage_.data() + begin_; }
  Bytes content() { return Bytes(data(), data() + bytes_); }
  bool guards_intact() const {
    for (size_t i = 0; i < storage_.size(); ++i) {
      if ((i < begin_ || i >= begin_ + bytes_) && storage_[i] != kMark) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr std::byte kMark{0xa5};
  size_t bytes_, begin_;
  Bytes storage_;
};
