// Straight-line programs of ranks over shared cells and places, as a model to explore.
//
// Once a collective has been entered, what a rank does next depends on no data: it is a list of posts, awaits and moves.
// The places are pieces of shared memory; a place holds the name of the move that wrote it last, and every read must find
// what it finds in an undisturbed run. So a slot, buffer, record or tensor that is overwritten too early, or read too
// early, is found in the interleaving where the wrong one comes first. A move is made at once: if nothing orders it and
// another move of the same place, both orders are explored.
//
// Order `kSequential` is interleavings alone. In `kReleaseAcquire` a rank's instructions run in any order but for what
// C2 promises: a post comes after all that stands before it, an await before all that stands after it, and a place is
// used in order. `kFences` adds that nothing passes a post: it is a sequentially consistent exchange.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace model {

enum class Order { kSequential, kFences, kReleaseAcquire, kRelaxed };  // relaxed: posts order nothing (a mutation)

struct Instruction {
  // kLook: raise if any rank has failed (F5).
  enum Kind : uint8_t { kPost, kAwait, kMove, kLook } kind;
  const char* what;
  uint8_t cell = 0, value = 0;
  std::vector<uint8_t> reads{}, writes{};  // places
  std::vector<uint8_t> expected{};         // who must have written what is read
  uint8_t name = 0;                        // of a move that writes
};

struct Program {
  std::vector<std::vector<Instruction>> ranks;
  std::vector<std::vector<uint8_t>> tensors;  // of each rank: the places that its user owns
  size_t cells = 0, places = 0;
};

class Ranks {
 public:
  static constexpr int kMost = 3, kCells = 24, kPlaces = 64;
  static constexpr uint8_t kScribble = 255;  // the name of what a rank writes that has given up

  enum Phase : uint8_t { kRunning, kFailing, kOver };
  struct State {
    std::array<uint8_t, kMost> at;  // the first instruction that has not run,
    std::array<uint8_t, kMost> phase;
    std::array<uint8_t, kMost> tainted;  // which instruction has read what it should not (from 1)
    std::array<uint8_t, kMost> padding;
    std::array<uint32_t, kMost> ahead;  // and which of those after it have (bit 0: the next)
    std::array<uint8_t, kCells> cells;
    std::array<uint8_t, kPlaces> places;
  };

  // `failing`: which ranks may give up while they wait (bits). `scribble_first`: a mutation.
  Ranks(Program program, Order order, uint32_t failing = 0, bool scribble_first = false)
      : p_(std::move(program)), order_(order), failing_(failing), scribble_first_(scribble_first) {
    int name = 1;
    for (auto& rank : p_.ranks) {
      for (Instruction& i : rank) {
        if (!i.writes.empty()) i.name = static_cast<uint8_t>(name++);
      }
      if (rank.size() > 250 || name > 250) throw std::length_error("more instructions than have names");
    }
    const bool fits = p_.ranks.size() <= kMost && p_.cells <= kCells && p_.places <= kPlaces;
    if (!fits) throw std::length_error("more than a state has room for");
    expect();
  }

  State initial() const { return {}; }

  bool finished(const State& s) const {
    for (size_t r = 0; r < p_.ranks.size(); ++r) {
      if (s.phase[r] != kOver && !done(s, r)) return false;
    }
    return true;
  }

  // In what a rank read what it should not. Where ranks fail that is wrong only once it has returned success.
  const char* wrong(const State& s) const {
    for (size_t r = 0; r < p_.ranks.size(); ++r) {
      if (s.tainted[r] && (failing_ == 0 || done(s, r))) return p_.ranks[r][s.tainted[r] - 1].what;
    }
    return nullptr;
  }

  template <class Emit>
  void moves(const State& s, const Emit& emit) const {
    for (size_t r = 0; r < p_.ranks.size(); ++r) {
      if (s.phase[r] == kFailing) {
        fail_further(s, r, emit);
      } else if (s.phase[r] == kRunning) {
        for (size_t i = s.at[r]; i < p_.ranks[r].size() && i < s.at[r] + 33u; ++i) {
          if (!has_run(s, r, i) && may_run(s, r, i)) step(s, r, i, emit);
          if (order_ == Order::kSequential) break;
        }
      }
    }
  }

 private:
  bool done(const State& s, size_t r) const { return s.phase[r] == kRunning && s.at[r] == p_.ranks[r].size(); }

  static bool has_run(const State& s, size_t r, size_t i) {
    return i < s.at[r] || (i > s.at[r] && (s.ahead[r] >> (i - s.at[r] - 1) & 1) != 0);
  }

  // Whether all those before it that it must not pass have run.
  bool may_run(const State& s, size_t r, size_t i) const {
    for (size_t j = s.at[r]; j < i; ++j) {
      if (!has_run(s, r, j) && ordered(p_.ranks[r][j], p_.ranks[r][i])) return false;
    }
    return true;
  }

  bool ordered(const Instruction& a, const Instruction& b) const {
    using I = Instruction;
    if (a.kind == I::kAwait || a.kind == I::kLook) return true;
    if (b.kind == I::kPost && (order_ != Order::kRelaxed || a.kind == I::kPost)) return true;
    if (a.kind == I::kPost && order_ == Order::kFences) return true;
    return share(a.writes, b.writes) || share(a.writes, b.reads) || share(a.reads, b.writes);
  }

  static bool share(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
    return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
  }

  template <class Emit>
  void step(const State& s, size_t r, size_t i, const Emit& emit) const {
    const Instruction& x = p_.ranks[r][i];
    State next = s;
    const int who = static_cast<int>(r);
    if (x.kind == Instruction::kAwait && s.cells[x.cell] < x.value) {
      if ((failing_ >> r & 1) != 0 || any_failed(s)) {
        fail(next, r);
        emit(next, who, "gives up");
      }
      return;
    }
    if (x.kind == Instruction::kLook && any_failed(s)) {
      fail(next, r);
      return emit(next, who, "finds that a rank has failed");
    }
    if (x.kind == Instruction::kPost) next.cells[x.cell] = x.value;
    for (size_t k = 0; k < x.reads.size(); ++k) {
      if (x.expected[k] != s.places[x.reads[k]]) next.tainted[r] = static_cast<uint8_t>(i + 1);
    }
    for (const uint8_t place : x.writes) next.places[place] = x.name;
    advance(next, r, i);
    emit(next, who, x.what);
  }

  static void advance(State& s, size_t r, size_t i) {
    if (i > s.at[r]) {
      s.ahead[r] |= uint32_t{1} << (i - s.at[r] - 1);
      return;
    }
    for (bool more = true; more; s.ahead[r] >>= 1) {
      ++s.at[r];
      more = (s.ahead[r] & 1) != 0;
    }
  }

  bool any_failed(const State& s) const {
    const uint8_t told = scribble_first_ ? kOver : kFailing;
    return std::any_of(s.phase.begin(), s.phase.end(), [&](uint8_t phase) { return phase >= told; });
  }

  // Two moves, with others between: tell the others, then use the own tensors for something else.
  void fail(State& s, size_t r) const {
    s.phase[r] = kFailing;
    if (scribble_first_) scribble(s, r);
  }
  template <class Emit>
  void fail_further(const State& s, size_t r, const Emit& emit) const {
    State next = s;
    next.phase[r] = kOver;
    if (!scribble_first_) scribble(next, r);
    emit(next, static_cast<int>(r), scribble_first_ ? "says that it has failed" : "uses its tensors again");
  }
  void scribble(State& s, size_t r) const {
    for (const uint8_t place : p_.tensors[r]) s.places[place] = kScribble;
  }

  // What every read finds where each rank runs as far as it can, in turn.
  void expect() {
    State s = initial();
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t r = 0; r < p_.ranks.size(); ++r) {
        for (; s.at[r] < p_.ranks[r].size(); ++s.at[r]) {
          Instruction& x = p_.ranks[r][s.at[r]];
          if (x.kind == Instruction::kAwait && s.cells[x.cell] < x.value) break;
          if (x.kind == Instruction::kPost) s.cells[x.cell] = x.value;
          for (const uint8_t place : x.reads) x.expected.push_back(s.places[place]);
          for (const uint8_t place : x.writes) s.places[place] = x.name;
          moved = true;
        }
      }
    }
  }

  Program p_;
  const Order order_;
  const uint32_t failing_;
  const bool scribble_first_;
};

}  // namespace model
