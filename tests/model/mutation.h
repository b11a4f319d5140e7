// Recorded instructions, and what is made wrong in them on purpose: the checker must find each of these.
#pragma once

#include <algorithm>
#include <vector>

#include "core/layout.h"
#include "program.h"

namespace model {

struct Range {
  const void* begin;
  size_t bytes;
};

// An instruction with addresses still.
struct Recorded {
  Instruction::Kind kind;
  const char* what;
  const void* cell = nullptr;
  uint64_t value = 0;
  std::vector<Range> reads{}, writes{};
};

struct Mutation {
  bool early = false;              // W1: a barrier waits for the posts of the one two before
  bool one_cell = false;           // W3: both parities share one cell, with its record
  bool one_slot = false;           // W5: both parities share one slot,
  bool one_place = false;          // or a rank's own place is also that of another rank (two-shot alone)
  bool post_before_moves = false;  // C2
  bool no_last_barrier = false;    // W5, W6
  bool no_credit = false;          // L2: the sender does not wait for a free buffer
  bool credit_first = false;       // L2: the receiver posts the credit before it has read
  bool no_look = false;            // F5
  bool no_records = false;         // not wrong: without them what happens to the slots is seen
  int link_slots = 2;              // L4
};

namespace detail {

// Whether the cell is one of these of some rank, of channel 0.
inline bool is_cell(const Recorded& r, const pycoll::PeerTable& t, size_t first, size_t end) {
  for (int rank = 0; rank < t.geometry.world; ++rank) {
    if (r.cell >= &t.cell(rank, 0, first) && r.cell < &t.cell(rank, 0, end)) return true;
  }
  return false;
}
inline bool is_barrier(const Recorded& r, const pycoll::PeerTable& t) { return is_cell(r, t, 0, 2); }
inline bool is_credit(const Recorded& r, const pycoll::PeerTable& t) {
  return is_cell(r, t, 2 + pycoll::kLinkKinds, t.geometry.cells_per_channel());
}

}  // namespace detail

// What one rank's instructions say, and their order.
inline void mutate(std::vector<Recorded>& all, const Mutation& m, const pycoll::PeerTable& t) {
  const auto is_post = [](const Recorded& r) { return r.kind == Instruction::kPost; };
  for (size_t i = 0; i < all.size(); ++i) {
    if (!is_post(all[i]) || !(m.post_before_moves || (m.credit_first && detail::is_credit(all[i], t)))) continue;
    for (size_t j = i; j > 0 && all[j - 1].kind == Instruction::kMove; --j) std::swap(all[j], all[j - 1]);
  }
  for (Recorded& r : all) {
    if (m.early && !is_post(r) && detail::is_barrier(r, t)) r.value = r.value > 2 ? r.value - 2 : 0;
  }
  if (m.no_credit) {
    std::erase_if(all, [&](const Recorded& r) { return !is_post(r) && r.cell && detail::is_credit(r, t); });
  }
  if (m.no_last_barrier) {  // of the first call
    const auto next_call =
        std::find_if(all.begin() + 1, all.end(), [&](const Recorded& r) { return r.what == all[0].what; });
    const auto after = std::find_if(std::make_reverse_iterator(next_call), all.rend(), is_post).base();
    all.erase(after - 1, after - 1 + t.geometry.world);  // the post, and an await for each other rank
  }
}

// Where an address really lies.
inline const std::byte* alias(const std::byte* address, const Mutation& m, const pycoll::PeerTable& t) {
  const pycoll::Geometry& g = t.geometry;
  for (int r = 0; r < g.world; ++r) {
    const auto within = [&](const void* begin, size_t bytes) {
      return address >= begin && address < static_cast<const std::byte*>(begin) + bytes;
    };
    if (m.one_cell && within(&t.cell(r, 0, 1), sizeof(pycoll::Cell))) return address - sizeof(pycoll::Cell);
    if (m.one_slot && within(t.slot(r, 0, 1), g.slot_bytes)) return address - g.slot_bytes;
    for (const uint64_t parity : {0, 1}) {
      if (!m.one_place || !within(t.slot(r, 0, parity) + r * g.place_bytes(), g.place_bytes())) continue;
      return r + 1 < g.world ? address + g.place_bytes() : address - g.place_bytes();
    }
  }
  return address;
}

}  // namespace model
