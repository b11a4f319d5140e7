// What the library's own algorithms do, as programs for the checker (program.h).
//
// The templates of csrc/algorithms and csrc/core run here on an executor that waits for nothing and moves nothing: it
// writes down each post, await, copy and combine. So what is explored is the code that ranks run: which cell, which
// slot, which buffer, in which order.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "algorithms/call.h"
#include "mutation.h"
#include "program.h"

namespace model {

// The executor of core/channel.h.
class Recorder {
 public:
  static constexpr size_t kElement = sizeof(float);

  Recorder(std::vector<Recorded>& to, int world)
      : to_(to), pointers_(2 * static_cast<size_t>(world) + 4), units_(world), world_(world) {}

  bool leader() const { return true; }
  bool sync(bool ok) const { return ok; }
  bool await(const pycoll::Cell& cell, uint64_t value, int) {
    to_.push_back({Instruction::kAwait, "awaits", &cell, value});
    return true;
  }
  bool await_barrier(const pycoll::PeerTable& t, int channel, uint64_t epoch) {
    for (int i = 1; i < world_; ++i) {
      const int peer = (t.rank + i) % world_;
      await(t.barrier_cell(peer, channel, epoch), epoch, peer);
    }
    return true;
  }
  void post(pycoll::Cell& cell, uint64_t value) { to_.push_back({Instruction::kPost, "posts", &cell, value}); }
  void combine(const pycoll::CombineArgs& a) {
    std::vector<Range> reads, writes;
    for (int i = 0; i < a.src_count; ++i) reads.push_back({a.src[i], a.count * kElement});
    for (int i = 0; i < a.dst_count; ++i) writes.push_back({a.dst[i], a.count * kElement});
    move("combines", reads, writes);
  }
  void copy(void* dst, const void* src, size_t bytes) { move("copies", {{src, bytes}}, {{dst, bytes}}); }
  const void** sources() { return const_cast<const void**>(pointers_.data()); }
  void** destinations() { return pointers_.data() + world_ + 1; }
  uint64_t* units() { return units_.data(); }
  void report_counts(int, int, uint64_t, uint64_t) {}  // counts never differ here

  // What surrounds a call.
  void move(const char* what, const std::vector<Range>& reads, const std::vector<Range>& writes) {
    to_.push_back({Instruction::kMove, what, nullptr, 0, reads, writes});
  }
  void look() { to_.push_back({Instruction::kLook, "looks for failures"}); }

 private:
  std::vector<Recorded>& to_;
  std::vector<void*> pointers_;
  std::vector<uint64_t> units_;
  const int world_;
};

// One collective as all ranks call it. All-reduce and broadcast work in place.
struct Call {
  pycoll::Collective collective;
  pycoll::Algorithm algorithm;
  size_t count;           // elements; in an all-to-all those for each pair of ranks
  uint32_t in_heap = 0;   // the ranks (bits) whose tensors peers read and write where they lie (W6)
  bool mismatch = false;  // rank 0 calls something else (W3)
};

class Recording {
 public:
  Recording(int world, const std::vector<Call>& calls, const Mutation& mutation = {}) : mutation_(mutation) {
    const size_t buffer = pycoll::kGrain * Recorder::kElement;  // each place of a slot and each link buffer: one grain
    geometry_ = {world, 1, mutation.link_slots, world * buffer, buffer, 2 * kTensorBytes};
    for (int r = 0; r < world; ++r) {
      const size_t bytes = geometry_.segment_bytes() + 2 * kTensorBytes, line = alignof(pycoll::Cell);
      memory_.push_back(std::make_unique_for_overwrite<std::byte[]>(bytes + line));
      base_.push_back(memory_[r].get() + (line - reinterpret_cast<uintptr_t>(memory_[r].get()) % line) % line);
    }
    recorded_.resize(world);
    for (int r = 0; r < world; ++r) {
      record(r, calls);
      mutate(recorded_[r], mutation_, table(r));
    }
  }

  // Addresses become numbers: of cells, and of the pieces of memory that more than one rank uses.
  Program program() const {
    const Pieces pieces(*this);
    Program p;
    std::vector<const std::byte*> cells;
    for (const auto& rank : recorded_) {
      p.ranks.emplace_back();
      for (const Recorded& r : rank) {
        Instruction i{r.kind, r.what, 0, static_cast<uint8_t>(r.value), pieces.of(r.reads), pieces.of(r.writes)};
        if (r.cell) i.cell = number(cells, alias(r.cell));
        if (r.kind != Instruction::kMove || !i.reads.empty() || !i.writes.empty()) p.ranks.back().push_back(i);
      }
    }
    for (size_t r = 0; r < base_.size(); ++r) p.tensors.push_back(pieces.of({{table(r).heap(r), 2 * kTensorBytes}}));
    p.cells = cells.size();
    p.places = pieces.count;
    return p;
  }

 private:
  static constexpr size_t kTensorBytes = size_t{1} << 12;

  // The memory that is used, cut at every address where a range begins or ends.
  struct Pieces {
    explicit Pieces(const Recording& of) : recording(of) {
      const auto for_each_range = [&](const auto& f) {
        for (size_t rank = 0; rank < of.recorded_.size(); ++rank) {
          for (const Recorded& r : of.recorded_[rank]) {
            for (const Range& range : r.reads) f(rank, of.alias(range.begin), range.bytes);
            for (const Range& range : r.writes) f(rank, of.alias(range.begin), range.bytes);
          }
        }
      };
      for_each_range(
          [&](size_t, const std::byte* begin, size_t bytes) { cuts.insert(cuts.end(), {begin, begin + bytes}); });
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
      users.resize(cuts.size());
      for_each_range([&](size_t rank, const std::byte* begin, size_t bytes) {
        for (size_t i = index(begin); cuts[i] < begin + bytes; ++i) users[i] |= 1u << rank;
      });
      for (size_t i = 0; i < cuts.size(); ++i) numbers.push_back(static_cast<uint8_t>(shared(i) ? count++ : 0));
    }
    size_t index(const std::byte* at) const {
      return static_cast<size_t>(std::lower_bound(cuts.begin(), cuts.end(), at) - cuts.begin());
    }
    bool shared(size_t i) const { return (users[i] & (users[i] - 1)) != 0; }
    std::vector<uint8_t> of(const std::vector<Range>& ranges) const {
      std::vector<uint8_t> all;
      for (const Range& range : ranges) {
        const std::byte* begin = recording.alias(range.begin);
        for (size_t i = index(begin); i < cuts.size() && cuts[i] < begin + range.bytes; ++i) {
          if (shared(i)) all.push_back(numbers[i]);
        }
      }
      return all;
    }
    const Recording& recording;
    std::vector<const std::byte*> cuts;
    std::vector<uint32_t> users;
    std::vector<uint8_t> numbers;
    size_t count = 0;
  };

  static uint8_t number(std::vector<const std::byte*>& known, const std::byte* cell) {
    const auto at = std::find(known.begin(), known.end(), cell);
    const auto n = static_cast<uint8_t>(at - known.begin());
    if (at == known.end()) known.push_back(cell);
    return n;
  }

  pycoll::PeerTable table(int rank) const { return {rank, geometry_, base_.data()}; }

  const std::byte* alias(const void* address) const {
    return model::alias(static_cast<const std::byte*>(address), mutation_, table(0));
  }

  // As cpu/communicator.cpp calls the algorithms.
  void record(int rank, const std::vector<Call>& calls) {
    using namespace pycoll;
    const PeerTable peers = table(rank);
    const int world = geometry_.world;
    Recorder exec(recorded_[rank], world);
    WindowState state;
    ChannelLinks links(peers, 0);
    for (const Call& call : calls) {
      const bool in_place = call.collective == Collective::kAllReduce || call.collective == Collective::kBroadcast;
      CallRecord mine{};
      mine.count = call.collective == Collective::kAllToAll ? 0 : call.count;
      mine.collective = call.collective;
      mine.algorithm = call.mismatch && rank == 0 ? Algorithm::kOneShot : call.algorithm;
      std::vector<CallRecord> records(world, mine);  // as they will be found after the entry
      for (int r = 0; r < world; ++r) {
        const bool mapped = (call.in_heap >> r & 1) != 0;
        records[r].in_offset = mapped ? 0 : kNotMapped;
        records[r].out_offset = !mapped ? kNotMapped : in_place ? 0 : kTensorBytes;
      }
      mine = records[rank];
      const bool mapped = mine.in_offset != kNotMapped;
      std::byte* in = base_[rank] + (mapped ? geometry_.heap_offset() : geometry_.segment_bytes());
      std::byte* out = in_place ? in : in + kTensorBytes;
      const Range input{in, in_place ? kTensorBytes : 2 * kTensorBytes}, output{out, kTensorBytes};
      exec.move("fills its tensors", {}, {input});

      const auto enter = [&](Window<Recorder>& w) {
        const auto record_of = [&](int r, uint64_t epoch) {
          return Range{&peers.barrier_cell(r, 0, epoch).record, sizeof(CallRecord)};
        };
        if (!mutation_.no_records) exec.move("records its call", {}, {record_of(rank, state.epoch + 1)});
        w.barrier();
        std::vector<Range> all;
        for (int r = 0; r < world; ++r) all.push_back(record_of(r, state.epoch));
        if (!mutation_.no_records) exec.move("compares the records", all, {});
        return !call.mismatch;
      };
      const std::vector<uint64_t> counts(world, call.count);
      Operation op{in, out, Recorder::kElement, rank, world, {}};
      if (call.collective == Collective::kAllToAll) {  // what is read of slots is not what was recorded: all know it
        op.send_counts = op.recv_counts = counts.data();
        for (int r = 0; r < world; ++r) {
          for (const uint64_t parity : {0, 1}) {
            std::fill_n(reinterpret_cast<uint64_t*>(peers.slot(r, 0, parity)), 2 * world, call.count);
          }
        }
      }
      dispatch_call(call.collective, mine.algorithm, [&](auto tag) {
        using A = typename decltype(tag)::type;
        if constexpr (!requires { typename A::OnlyOnGpus; }) {
          run_call<A>(exec, op, peers, 0, 1, links, state, records.data(), mine, enter);
        }
      });
      if (call.mismatch) return;
      if (call.in_heap && !mutation_.no_look) exec.look();
      exec.move("uses the result", {output}, {input});
    }
  }

  const Mutation mutation_;
  pycoll::Geometry geometry_;
  std::vector<std::unique_ptr<std::byte[]>> memory_;
  std::vector<std::byte*> base_;
  std::vector<std::vector<Recorded>> recorded_;
};

}  // namespace model
