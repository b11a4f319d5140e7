// Exchange: the window of an all-to-all, in which every pair of ranks has a count of its own.
//
// A rank knows what it sends to each and what it expects of each. Round 0 tells that to all, and all compare: then every
// rank knows how many rounds there are, and where in the peers' tensors its own part lies. The rounds after it move data.
#pragma once

#include "core/window.h"

namespace pycoll {

template <class Exec>
class Exchange : public Window<Exec> {
 public:
  PYCOLL_HD Exchange(Exec& exec, Operation& op, const PeerTable& peers, int channel, int channels, WindowState& state,
                     const CallRecord* records, const CallRecord& mine)
      : Window<Exec>(exec, op, peers, channel, state, records, mine), channels_(channels), chunk_(op.partition.chunk) {}

  PYCOLL_HD bool tells_counts() const { return this->round_ == 0; }
  PYCOLL_HD size_t rounds() const { return rounds_; }
  PYCOLL_HD void take_all_at_once() { chunk_ = ~size_t{0} / 2; }

  PYCOLL_HD void stage_counts() {
    const size_t row = this->world() * sizeof(uint64_t);
    std::byte* slot = this->slot(this->rank());
    this->exec_.copy(slot, this->op_.send_counts, row);
    this->exec_.copy(slot + row, this->op_.recv_counts, row);
  }

  PYCOLL_HD void take_counts() {
    size_t most = 0;
    uint64_t* before = this->exec_.units();  // elements in each rank's tensor before those for this one
    for (int from = 0; from < this->world(); ++from) {
      before[from] = 0;
      for (int to = 0; to < this->world(); ++to) {
        const uint64_t sent = counts(from)[to], expected = counts(to)[this->world() + from];
        if (sent != expected) return this->exec_.report_counts(from, to, sent, expected);
        if (to < this->rank()) before[from] += sent;
        const size_t share = share_of(sent).length;
        most = share > most ? share : most;
      }
    }
    rounds_ = 1 + ceil_div(most, chunk_);
  }

  PYCOLL_HD void stage_for(int r) {
    if (this->mine_.in_offset != kNotMapped) return;
    const Span s = span(this->op_.send_counts[r]);
    this->exec_.copy(this->place(this->rank(), r), own(r, s), this->bytes(s));
  }

  PYCOLL_HD void take_from(int r) {
    const Span s = span(this->op_.recv_counts[r]);
    const Span theirs = {this->exec_.units()[r] + s.offset, s.length};
    const std::byte* src = r == this->rank()       ? own(r, s)
                           : this->input_mapped(r) ? this->tensor(r, this->records_[r].in_offset, theirs)
                                                   : this->place(r, this->rank());
    const size_t offset = sum_before(this->op_.recv_counts, r) + s.offset;
    this->exec_.copy(this->op_.out + offset * this->op_.element_bytes, src, this->bytes(s));
  }

 private:
  PYCOLL_HD const uint64_t* counts(int r) const { return reinterpret_cast<const uint64_t*>(this->slot(r)); }
  PYCOLL_HD Span share_of(uint64_t count) const { return channel_share(count, this->channel_, channels_); }
  // Of what a pair of ranks exchanges, this round's part.
  PYCOLL_HD Span span(uint64_t count) const {
    const Span share = share_of(count);
    const size_t done = smaller(share.length, (this->round_ - 1) * chunk_);
    return {share.offset + done, smaller(share.length - done, chunk_)};
  }
  PYCOLL_HD const std::byte* own(int r, Span s) const {
    return this->input({sum_before(this->op_.send_counts, r) + s.offset, s.length});
  }
  PYCOLL_HD static size_t sum_before(const uint64_t* counts, int r) {
    size_t sum = 0;
    for (int i = 0; i < r; ++i) sum += counts[i];
    return sum;
  }

  const int channels_;
  size_t chunk_;
  size_t rounds_ = 1;
};

}  // namespace pycoll
