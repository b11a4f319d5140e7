// The lane on which this rank receives from one other (csrc/README.md, M3 to M5): takes envelopes, grants, reads chunks.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "cpu/mail_lane.h"
#include "cpu/mail_match.h"

namespace pycoll::cpu {

class Inbox {
 public:
  Inbox(const Pair& pair, Matching& matching) : p_(pair), matching_(matching) {}

  void advance(Step& step);
  // A receive has found its message.
  void meet(const LetterPtr& letter, const Announced& message, Step& step);
  bool busy() const { return matching_.wanted(p_.peer) || needs_peer() || !landing_.empty(); }
  bool needs_peer() const { return !met_.empty() || !receiving_.empty(); }  // for what has met its message
  bool answered_any() { return std::exchange(answered_any_, false); }  // since last asked: a receive from any source
  void give_up(Books& books, const std::exception_ptr& failure, bool at_once);

 private:
  void take_envelopes(Step& step);
  void land(Step& step);
  void grant(Step& step);
  void read_chunks(Step& step);
  bool settle(Step& step);
  bool read_chunk(uint64_t chunk, Step& step);
  void finish(const LetterPtr& letter, Step& step);

  const Pair p_;
  Matching& matching_;
  std::vector<LetterPtr> landing_;    // small, on their way into memory of a GPU
  std::deque<LetterPtr> met_;         // large, not granted
  std::vector<LetterPtr> receiving_;  // granted
  Moving moving_;
  uint64_t taken_ = 0, granted_ = 0, emptied_ = 0;  // so far
  bool answered_any_ = false;
};

}  // namespace pycoll::cpu
