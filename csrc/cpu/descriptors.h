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

  // kNoRoom: later there may be; a user may have about as many descriptors under way as a process may have open.
  enum class Sent { kYes, kNoRoom, kNoSuchBox, kNo };
  // Needs no answer: the box's queue keeps it. Never waits.
  static Sent send(const std::string& token, int sender, uint64_t tag, std::span<const int> descriptors);

  // The next delivery of a process of this user, if one has come within `patience`.
  std::optional<Delivery> take(std::chrono::milliseconds patience);

 private:
  std::string token_;
  Fd listener_;
};

}  // namespace pycoll::cpu
