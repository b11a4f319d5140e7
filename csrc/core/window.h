// Window: phases over everybody's memory, between barriers. The direct algorithms are written in it.
//
// A phase names chunks and ranks; where a rank's data lie (in its heap, which peers read and write in place, or in its
// staging slot) is settled here and nowhere else. Invariants W1 to W6 of csrc/README.md are kept here; `Exec` is
// described in core/channel.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/channel.h"
#include "core/layout.h"

namespace pycoll {

// Who gets what the owner of a chunk has computed.
enum class Receivers { kOwner, kRoot, kAll };

// What a channel keeps from call to call: barriers, publishes and exchanges so far. Private to the rank, equal on all ranks.
struct WindowState {
  uint64_t epoch = 0;
  uint64_t publishes = 0;
  uint64_t exchanges = 0;  // of words
};

template <class Exec>
class Window {
 public:
  // `records`: the call as each rank recorded it [world]; filled, and compared, by the entry, so read only after the
  // first barrier.
  PYCOLL_HD Window(Exec& exec, Operation& op, const PeerTable& peers, int channel, WindowState& state,
                   const CallRecord* records, const CallRecord& mine)
      : exec_(exec), op_(op), peers_(peers), channel_(channel), state_(state), records_(records), mine_(mine) {}

  PYCOLL_HD int rank() const { return op_.rank; }
  PYCOLL_HD int world() const { return op_.world; }
  PYCOLL_HD int root() const { return mine_.root; }
  PYCOLL_HD size_t block() const { return op_.partition.stride; }  // elements of one rank's block of the tensor
  PYCOLL_HD size_t rounds() const { return op_.partition.rounds(); }
  PYCOLL_HD bool input_mapped(int r) const { return records_[r].in_offset != kNotMapped; }
  PYCOLL_HD bool output_mapped(int r) const { return records_[r].out_offset != kNotMapped; }

  template <class Predicate>
  PYCOLL_HD int count_ranks(Predicate p) const {
    int n = 0;
    for (int r = 0; r < world(); ++r) n += p(r);
    return n;
  }

  // Nothing needs a slot, so nothing limits a round: take the whole share in one.
  PYCOLL_HD void take_all_at_once() {
    Partition& p = op_.partition;
    p.chunk = round_up(p.stride ? p.share.length : ceil_div(p.share.length, p.chunks), kGrain);
  }

  PYCOLL_HD void begin_publish(size_t round) { begin(round, state_.publishes++); }
  PYCOLL_HD void begin_combine(size_t round) { begin(round, published(round)); }
  PYCOLL_HD void first_publish() { first_ = state_.publishes; }

  // ---- publish: into the own slot, for others to read ----

  PYCOLL_HD void stage_chunk(int c) {
    if (mine_.in_offset != kNotMapped) return;
    const Span s = op_.partition.at(round_, c);
    exec_.copy(place(rank(), c), input(s), bytes(s));
  }
  PYCOLL_HD void stage_chunk_always(int c) {  // multimem: the switch knows slots, not tensors
    const Span s = op_.partition.at(round_, c);
    exec_.copy(place(rank(), c), input(s), bytes(s));
  }
  PYCOLL_HD void stage_own() {  // all-gather: the input is one block, the whole of it for everybody
    if (mine_.in_offset != kNotMapped) return;
    const Span s = op_.partition.at(round_, 0);
    exec_.copy(slot(rank()), input(s), bytes(s));
  }
  PYCOLL_HD void stage_round() {  // one-shot: always, since peers must not read a tensor that its rank overwrites
    const Span s = op_.partition.whole(round_);
    exec_.copy(slot(rank()), input(s), bytes(s));
  }

  // ---- combine: from everybody's slots or tensors ----

  // My chunk: reduced over all ranks in rank order, to the outputs of those who get it, so far as they are mapped or my
  // own, and to my slot for the others.
  PYCOLL_HD void reduce_chunk(int c, size_t out_shift, Receivers receivers) {
    const Span s = op_.partition.at(round_, c);
    const void** src = exec_.sources();
    void** dst = exec_.destinations();
    int dsts = 0;
    if (receivers != Receivers::kRoot || rank() == root()) {
      dst[dsts++] = op_.out + (s.offset - out_shift) * op_.element_bytes;
    }
    bool others_collect = false;
    for (int r = 0; r < world(); ++r) {
      src[r] = r == rank() ? input(s) : chunk_of(r, c, s);
      if (r == rank() || receivers == Receivers::kOwner || (receivers == Receivers::kRoot && r != root())) continue;
      if (output_mapped(r)) {
        dst[dsts++] = tensor(r, records_[r].out_offset, s);
      } else {
        others_collect = true;
      }
    }
    if (others_collect) dst[dsts++] = place(rank(), c);
    exec_.combine({dst, dsts, src, world(), 0, true, world(), s.length});
  }

  PYCOLL_HD void reduce_round() {
    const Span s = op_.partition.whole(round_);
    const void** src = exec_.sources();
    void** dst = exec_.destinations();
    for (int r = 0; r < world(); ++r) src[r] = r == rank() ? input(s) : slot(r);
    dst[0] = op_.out + s.offset * op_.element_bytes;
    exec_.combine({dst, 1, src, world(), 0, true, world(), s.length});
  }

  // What rank r published of its own block, to chunk `c` of my output.
  PYCOLL_HD void copy_block(int r, int c) {
    const Span from = op_.partition.at(round_, 0), to = op_.partition.at(round_, c);
    const std::byte* src = r == rank()       ? input(from)
                           : input_mapped(r) ? tensor(r, records_[r].in_offset, from)
                                             : slot(r);
    std::byte* dst = op_.out + to.offset * op_.element_bytes;
    if (dst != src) exec_.copy(dst, src, bytes(to));
  }

  // What rank r published for me, chunk `c` of its input, to my output, which is that chunk alone.
  PYCOLL_HD void take_chunk(int r, int c) {
    const Span s = op_.partition.at(round_, c);
    const std::byte* src = r == rank() ? input(s) : chunk_of(r, c, s);
    std::byte* dst = op_.out + (s.offset - c * block()) * op_.element_bytes;
    if (dst != src) exec_.copy(dst, src, bytes(s));
  }

  // On my shard of all ranks' inputs and outputs.
  PYCOLL_HD void work_on_shard() {
    const void** in = exec_.sources();
    void** out = exec_.destinations();
    for (int r = 0; r < world(); ++r) {
      in[r] = peers_.heap(r) + records_[r].in_offset;
      out[r] = output_mapped(r) ? peers_.heap(r) + records_[r].out_offset : nullptr;
    }
    exec_.work(in, out);
  }

  // Multimem: the switch adds chunk `c` of all ranks' slots, and writes the sum into all of them.
  PYCOLL_HD void reduce_in_switch(int c) {
    const size_t offset = static_cast<size_t>(place(rank(), c) - peers_.base[rank()]);
    exec_.reduce_in_switch(peers_, offset, op_.partition.at(round_, c).length);
  }

  // ---- collect: what rank c computed, from its slot ----

  PYCOLL_HD void collect_chunk(int c) {
    if (mine_.out_offset != kNotMapped) return;  // it wrote my tensor itself
    const Span s = op_.partition.at(round_, c);
    exec_.copy(op_.out + s.offset * op_.element_bytes, place(c, c), bytes(s));
  }

  // Multimem: what the owners wrote into my own slot.
  PYCOLL_HD void collect_own(int c) {
    const Span s = op_.partition.at(round_, c);
    exec_.copy(op_.out + s.offset * op_.element_bytes, place(rank(), c), bytes(s));
  }

  // All ranks on this channel have done what came before. False: failed, give up.
  PYCOLL_HD bool barrier() {
    const uint64_t epoch = ++state_.epoch;  // every thread of the group keeps its own copy of the state
    exec_.sync(true);                       // the group has written all that the post announces
    bool ok = true;
    if (exec_.leader()) {
      exec_.post(peers_.barrier_cell(rank(), channel_, epoch), epoch);
      ok = exec_.await_barrier(peers_, channel_, epoch);
    }
    return exec_.sync(ok);
  }

 protected:
  PYCOLL_HD uint64_t published(size_t round) const { return first_ + round; }
  PYCOLL_HD void begin(size_t round, uint64_t publish) {
    round_ = round;
    parity_ = publish & 1;
  }
  PYCOLL_HD const std::byte* input(Span s) const { return op_.in + s.offset * op_.element_bytes; }
  PYCOLL_HD size_t bytes(Span s) const { return s.length * op_.element_bytes; }
  PYCOLL_HD std::byte* slot(int r) const { return peers_.slot(r, channel_, parity_); }
  PYCOLL_HD std::byte* place(int r, int c) const { return slot(r) + c * peers_.geometry.place_bytes(); }
  PYCOLL_HD std::byte* tensor(int r, uint64_t offset, Span s) const {
    return peers_.heap(r) + offset + s.offset * op_.element_bytes;
  }
  PYCOLL_HD const std::byte* chunk_of(int r, int c, Span s) const {
    return input_mapped(r) ? tensor(r, records_[r].in_offset, s) : place(r, c);
  }

  Exec& exec_;
  Operation& op_;
  const PeerTable& peers_;
  const int channel_;
  WindowState& state_;
  const CallRecord* records_;
  const CallRecord& mine_;
  uint64_t first_ = 0;
  uint64_t parity_ = 0;
  size_t round_ = 0;
};

}  // namespace pycoll
