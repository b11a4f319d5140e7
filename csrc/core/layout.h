// Where things lie in a rank's segment, and the table of all ranks' segments as this rank maps them. Plain data, for
// every device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cell.h"
#include "core/mailbox.h"
#include "core/partition.h"

namespace pycoll {

// What a connection is for, named from its receiver. Each has a head cell at the receiver and a credit cell at the
// sender.
enum LinkKind : int { kRingLink, kTreeUp0, kTreeUp1, kTreeDown, kLinkKinds };
constexpr int kLinkBuffers = 3;  // ring and tree are never in flight together: the ring's buffers serve child 0 as well

// The same on all ranks: agreed when they attach.
struct Geometry {
  int world;
  int channels;           // independent lanes: threads, blocks
  int link_slots;         // buffers a connection has, at least 2
  size_t slot_bytes;      // a window slot; each channel has two
  size_t link_bytes;      // one buffer of a connection
  size_t heap_bytes;      // address space for user tensors; memory is taken as they are made
  size_t word_bytes = 0;  // what one rank may send another at once in words (core/words.h), flags included; 0: nothing
  size_t mail_bytes = 0;  // one buffer of a lane's pipe (core/mailbox.h); 0: there are no lanes

  static constexpr size_t kControlBytes = 13 * 4096;  // cpu::Control; GPUs leave it empty
  static constexpr size_t kPage = size_t{2} << 20;

  PYCOLL_HD size_t cells_per_channel() const { return 2 + kLinkKinds + 4 * 2; }
  PYCOLL_HD size_t cells_offset() const { return kControlBytes; }
  PYCOLL_HD size_t slots_offset() const {
    return round_up(cells_offset() + channels * cells_per_channel() * sizeof(Cell), 4096);
  }
  PYCOLL_HD size_t links_offset() const { return slots_offset() + channels * 2 * slot_bytes; }
  PYCOLL_HD size_t words_offset() const {
    return links_offset() + static_cast<size_t>(channels) * kLinkBuffers * link_slots * link_bytes;
  }
  PYCOLL_HD size_t scratch_bytes() const { return words_offset() + channels * 2 * world * word_bytes; }
  // Mailboxes take memory only when they are used, unlike the scratch.
  PYCOLL_HD size_t mail_offset() const { return round_up(scratch_bytes(), 4096); }
  PYCOLL_HD size_t mailbox_bytes() const { return Mailbox::bytes(mail_bytes); }
  PYCOLL_HD size_t heap_offset() const { return round_up(mail_offset() + world * mailbox_bytes(), kPage); }
  PYCOLL_HD size_t segment_bytes() const { return heap_offset() + heap_bytes; }
  PYCOLL_HD size_t place_bytes() const { return slot_bytes / world / 64 * 64; }  // one rank's place in a slot
};

struct PeerTable {
  int rank;
  Geometry geometry;
  std::byte* const* base;          // [world] every rank's segment, mapped here
  std::byte* multicast = nullptr;  // all segments at once, through the switch that joins the GPUs, where there is one

  PYCOLL_HD Cell& cell(int r, int channel, size_t index) const {
    return reinterpret_cast<Cell*>(base[r] + geometry.cells_offset())[channel * geometry.cells_per_channel() + index];
  }
  PYCOLL_HD Cell& barrier_cell(int r, int channel, uint64_t epoch) const { return cell(r, channel, epoch & 1); }
  PYCOLL_HD Cell& head_cell(int receiver, int channel, LinkKind kind) const {
    return cell(receiver, channel, 2 + kind);
  }
  // A parent sends down to two children, so a sender's credits are told apart by kind and by child.
  PYCOLL_HD Cell& credit_cell(int sender, int channel, LinkKind kind, int child) const {
    return cell(sender, channel, 2 + kLinkKinds + 2 * kind + child);
  }
  PYCOLL_HD std::byte* slot(int r, int channel, uint64_t parity) const {
    return base[r] + geometry.slots_offset() + (2 * channel + parity) * geometry.slot_bytes;
  }
  // Where rank `from` leaves words for rank `r`.
  PYCOLL_HD uint64_t* words(int r, int channel, uint64_t parity, int from) const {
    const size_t place = (2 * channel + parity) * geometry.world + from;
    return reinterpret_cast<uint64_t*>(base[r] + geometry.words_offset() + place * geometry.word_bytes);
  }
  PYCOLL_HD std::byte* link_buffers(int receiver, int channel, LinkKind kind) const {
    const int buffer = kind == kTreeDown ? 2 : kind == kTreeUp1 ? 1 : 0;
    return base[receiver] + geometry.links_offset() +
           static_cast<size_t>(channel * kLinkBuffers + buffer) * geometry.link_slots * geometry.link_bytes;
  }
  // What rank `from` writes for rank `r` to read.
  PYCOLL_HD Mailbox& mailbox(int r, int from) const {
    return *reinterpret_cast<Mailbox*>(base[r] + geometry.mail_offset() + from * geometry.mailbox_bytes());
  }
  PYCOLL_HD std::byte* heap(int r) const { return base[r] + geometry.heap_offset(); }
};

}  // namespace pycoll
