// File descriptors on their way between processes of one machine: what peers map is handed over so.
#pragma once

#include <chrono>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cpu/os.h"

namespace pycoll::cpu {

struct Delivery {
  int sender;    // as it says: whoever knows the box's token is trusted so far
  uint64_t tag;  // what the sender calls it
  std::vector<Fd> descriptors;
};

// A socket in which a rank receives. It is abstract: it has no name in the file system.
class DescriptorBox {
 public:
  static constexpr int kMost = 4;  // descriptors in one delivery

  explicit DescriptorBox(int backlog);
  const std::string& token() const { return token_; }  // names the box, and proves that a sender was told of it

  // Needs no answer: the box's queue keeps it. False: there is no such box, or no room in its queue within `patience`
  // (0: now).
  static bool send(const std::string& token, int sender, uint64_t tag, std::span<const int> descriptors,
                   std::chrono::milliseconds patience);

  // The next delivery of a process of this user, if one has come within `patience`.
  std::optional<Delivery> take(std::chrono::milliseconds patience);

 private:
  std::string token_;
  Fd listener_;
};

}  // namespace pycoll::cpu
