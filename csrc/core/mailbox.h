// A mailbox: what one rank writes for one other to read, in the reader's segment, when they send each other messages
// (csrc/README.md, M1 to M5). The lane from s to r has its envelopes and its pipe in the mailbox of s at r, and its grants
// in the mailbox of r at s.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/partition.h"
#include "core/platform.h"

namespace pycoll {

struct Envelope {
  static constexpr size_t kRoom = 4096 - 64;  // bytes of a small message

  uint64_t bytes;  // of the message
  uint64_t kind;   // its element type
  int64_t tag;
  uint64_t small;  // 1: the contents follow
  alignas(64) std::byte contents[kRoom];
};
static_assert(sizeof(Envelope) == 4096);

struct Mailbox {
  static constexpr uint64_t kEnvelopes = 16, kBuffers = 8, kGrants = 8;

  struct alignas(128) Counter {  // a cell (C1, C2); sleepers are found at the reader's doorbell
    uint64_t value;
  };

  // As the sender of a lane: message n lies in envelopes[n % kEnvelopes], chunk c in buffer c % kBuffers.
  Counter posted, filled;
  alignas(128) uint64_t chunk_of[kBuffers];  // the number of the message of which each buffer holds a chunk
  // As the receiver of the lane that leads the other way: grant g is the number of a message, in grants[g % kGrants].
  Counter taken, granted, emptied;
  alignas(128) uint64_t grants[kGrants];
  alignas(4096) Envelope envelopes[kEnvelopes];
  // The buffers follow.

  PYCOLL_HD static size_t bytes(size_t buffer) {
    return buffer == 0 ? 0 : round_up(sizeof(Mailbox) + kBuffers * buffer, 4096);
  }
  PYCOLL_HD std::byte* buffer(uint64_t chunk, size_t buffer_bytes) {
    return reinterpret_cast<std::byte*>(this + 1) + chunk % kBuffers * buffer_bytes;
  }
};
static_assert(sizeof(Mailbox) == (1 + Mailbox::kEnvelopes) * 4096);

// Peers ring it when they have posted something in a mailbox of its owner (M8).
struct alignas(128) Doorbell {
  uint64_t rings;
  uint32_t sleepers;
};

}  // namespace pycoll
