// Words: small messages without a barrier ("low latency", the LL protocol of NCCL).
//
// A word is 8 bytes, written and read at once: 4 of data, 4 of a flag that says for which exchange they are. Whoever
// finds the flag has the data: nothing else needs to be waited for. Two words carry a unit of 8 bytes of elements, so a
// message takes twice its size. Invariants N1 to N5 of csrc/README.md are kept here; `Exec` is described in
// core/channel.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/atomic.h"
#include "core/channel.h"
#include "core/layout.h"
#include "core/window.h"

namespace pycoll {

constexpr size_t kUnitBytes = 8;                     // of elements
constexpr size_t kUnitWords = 2;                     // that carry them
constexpr uint64_t kCleanEvery = uint64_t{1} << 30;  // exchanges; less than flags tell apart (2^31)

// A header, and two areas of one grain of the largest elements.
constexpr size_t kLeastWordBytes = (1 + 2 * kGrain) * kUnitWords * sizeof(uint64_t);

// Units of a message, if a rank's place is split in so many areas of one message each. Before them lies a header.
PYCOLL_HD size_t word_capacity(const Geometry& g, int areas) {
  const size_t units = g.word_bytes / (kUnitWords * sizeof(uint64_t));
  return units > 0 ? (units - 1) / areas : 0;
}

template <class Exec>
class Words {
 public:
  PYCOLL_HD Words(Exec& exec, const Operation& op, const PeerTable& peers, int channel, WindowState& state,
                  const CallRecord& mine, int areas)
      : exec_(exec),
        op_(op),
        peers_(peers),
        channel_(channel),
        state_(state),
        mine_(mine),
        header_(digest(mine)),
        area_(word_capacity(peers.geometry, areas)) {}

  PYCOLL_HD int rank() const { return op_.rank; }
  PYCOLL_HD int world() const { return op_.world; }
  PYCOLL_HD size_t rounds() const { return op_.partition.rounds(); }
  PYCOLL_HD Span chunk(int c) const { return op_.partition.at(round_, c); }

  // Begins the exchange of a round: tells all what this rank calls, and hears what they call. False: some rank calls
  // something else, or failed (said to the whole group).
  PYCOLL_HD bool begin(size_t round) {
    round_ = round;
    const uint64_t exchange = ++state_.exchanges;  // every thread of the group keeps its own copy of the state
    parity_ = exchange & 1;
    flag_ = static_cast<uint32_t>(exchange) | 0x80000000u;  // never 0, which is what cleaned memory holds
    const bool cleaning = exchange % kCleanEvery <= 1;
    if (cleaning) clean(parity_ ^ 1);
    bool ok = true, same = true;
    if (exec_.leader()) {
      for (int i = 1; i < world(); ++i) put(place((rank() + i) % world(), rank())[0], header_);
      for (int i = 1; ok && i < world(); ++i) {
        const int r = (rank() + i) % world();
        unsigned looks = 0;
        const auto heard = [&] { return has_come(place(rank(), r)[0]) || (++looks % 64 == 0 && calls_another(r)); };
        ok = exec_.await_until(heard, r);
        same &= !ok || load_relaxed(place(rank(), r)[0]) == word(header_);
      }
      if (!same) exec_.report_mismatch(peers_, channel_, state_.epoch);
    }
    ok = exec_.sync(ok && same);
    if (cleaning) exec_.fence();
    return ok;
  }

  // My elements of the span, to rank `to`.
  PYCOLL_HD void push(int to, Span s) {
    for (size_t u = exec_.thread(); u < units(s); u += exec_.size()) put_unit(to, 0, u, load(op_.in, s, u));
  }

  // All ranks' elements of the span, which they have pushed, reduced in rank order to my output; and to all others.
  PYCOLL_HD void reduce(Span s, bool share) {
    uint64_t* all = exec_.units();
    for (size_t u = exec_.thread(); ok_ && u < units(s); u += exec_.size()) {
      for (int r = 0; ok_ && r < world(); ++r) all[r] = r == rank() ? load(op_.in, s, u) : take_unit(r, 0, u);
      if (!ok_) break;
      const uint64_t result = exec_.reduce(all, world());
      for (int i = 1; share && i < world(); ++i) put_unit((rank() + i) % world(), 1, u, result);
      store(s, u, result);
    }
  }

  // What rank `from` shared of its span, to my output.
  PYCOLL_HD void fetch(int from, Span s) {
    for (size_t u = exec_.thread(); ok_ && u < units(s); u += exec_.size()) {
      const uint64_t result = take_unit(from, 1, u);
      if (ok_) store(s, u, result);
    }
  }

  // All threads of the group have what they waited for.
  PYCOLL_HD bool end() { return exec_.sync(ok_); }

 private:
  PYCOLL_HD size_t units(Span s) const { return ceil_div(s.length * op_.element_bytes, kUnitBytes); }
  PYCOLL_HD uint64_t* place(int at, int from) const { return peers_.words(at, channel_, parity_, from); }
  PYCOLL_HD uint64_t* unit(int at, int from, int area, size_t u) const {
    return place(at, from) + kUnitWords * (1 + area * area_ + u);
  }

  PYCOLL_HD uint64_t word(uint32_t data) const { return uint64_t{flag_} << 32 | data; }
  PYCOLL_HD void put(uint64_t& at, uint32_t data) const { store_relaxed(at, word(data)); }
  PYCOLL_HD bool has_come(const uint64_t& at) const { return load_relaxed(at) >> 32 == flag_; }
  PYCOLL_HD void put_unit(int to, int area, size_t u, uint64_t value) const {
    uint64_t* words = unit(to, rank(), area, u);
    put(words[0], static_cast<uint32_t>(value));
    put(words[1], static_cast<uint32_t>(value >> 32));
  }
  PYCOLL_HD uint64_t take_unit(int from, int area, size_t u) {
    const uint64_t* words = unit(rank(), from, area, u);
    uint32_t low = 0, high = 0;
    ok_ = take(words[0], from, low) && take(words[1], from, high);
    return uint64_t{high} << 32 | low;
  }
  PYCOLL_HD bool take(const uint64_t& at, int from, uint32_t& data) const {
    uint64_t value = 0;
    const auto come = [&] { return (value = load_relaxed(at)) >> 32 == flag_; };
    const bool ok = exec_.await_until(come, from);
    data = static_cast<uint32_t>(value);
    return ok;
  }

  // A rank that calls something else sends no word, but has posted its call.
  PYCOLL_HD bool calls_another(int r) const {
    const Cell& cell = peers_.barrier_cell(r, channel_, state_.epoch);
    return load_acquire(cell.value) >= state_.epoch && !same_call(cell.record, mine_);
  }

  // No word may carry a flag of 2^31 exchanges ago: what the other parity holds is done with, and nobody writes there
  // before it has heard from this rank in this exchange.
  PYCOLL_HD void clean(uint64_t parity) const {
    uint64_t* words = peers_.words(rank(), channel_, parity, 0);
    const size_t count = world() * peers_.geometry.word_bytes / sizeof(uint64_t);
    for (size_t i = exec_.thread(); i < count; i += exec_.size()) store_relaxed(words[i], uint64_t{0});
    exec_.fence();
    exec_.sync(true);
  }

  // 8 bytes of elements; fewer at the end. Elements may lie at any multiple of their size.
  PYCOLL_HD size_t bytes_of(Span s, size_t u) const {
    return smaller(kUnitBytes, s.length * op_.element_bytes - u * kUnitBytes);
  }
  PYCOLL_HD uint64_t load(const std::byte* base, Span s, size_t u) const {
    const std::byte* from = base + s.offset * op_.element_bytes + u * kUnitBytes;
    const size_t bytes = bytes_of(s, u);
    uint64_t value = 0;
    if (bytes == kUnitBytes && aligned(from)) {
      __builtin_memcpy(&value, __builtin_assume_aligned(from, kUnitBytes), kUnitBytes);
      return value;
    }
    for (size_t i = 0; i < bytes; ++i) value |= uint64_t{std::to_integer<uint8_t>(from[i])} << (8 * i);
    return value;
  }
  PYCOLL_HD void store(Span s, size_t u, uint64_t value) const {
    std::byte* to = op_.out + s.offset * op_.element_bytes + u * kUnitBytes;
    const size_t bytes = bytes_of(s, u);
    if (bytes == kUnitBytes && aligned(to)) {
      __builtin_memcpy(__builtin_assume_aligned(to, kUnitBytes), &value, kUnitBytes);
      return;
    }
    for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
  }
  PYCOLL_HD static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kUnitBytes == 0; }

  Exec& exec_;
  const Operation& op_;
  const PeerTable& peers_;
  const int channel_;
  WindowState& state_;
  const CallRecord& mine_;
  const uint32_t header_;
  const size_t area_;  // units
  uint64_t parity_ = 0;
  uint32_t flag_ = 0;
  size_t round_ = 0;
  bool ok_ = true;
};

}  // namespace pycoll
