// The lane on which this rank sends to one other (csrc/README.md, M2, M4, M5): announces messages, reads grants, gives chunks.
#pragma once

#include <deque>
#include <vector>

#include "cpu/mail_lane.h"

namespace pycoll::cpu {

class Outbox {
 public:
  explicit Outbox(const Pair& pair) : p_(pair) {}

  void add(LetterPtr letter) { waiting_.push_back(std::move(letter)); }
  void advance(Step& step);
  bool busy() const { return !waiting_.empty() || !announced_.empty() || !granted_.empty(); }
  // Ends what the receiver has not granted by now: it takes no message any more.
  void lose_what_is_not_granted(Step& step, const std::exception_ptr& failure);
  // Ends all but what a GPU still moves, unless `at_once`.
  void give_up(Books& books, const std::exception_ptr& failure, bool at_once);

 private:
  void announce(Step& step);
  void read_grants(Step& step);
  void give_chunks(Step& step);
  bool settle(Step& step);
  bool has_room();
  LetterPtr next_to_give(Step& step);
  void give(const LetterPtr& letter, Step& step);
  void post_chunks(const LetterPtr& letter, uint64_t chunks, Step& step);

  const Pair p_;
  std::deque<LetterPtr> waiting_;     // for an envelope
  std::vector<LetterPtr> announced_;  // large, not granted
  std::vector<LetterPtr> granted_;    // in the order of their grants
  Moving moving_;
  uint64_t posted_ = 0, grants_read_ = 0, filled_ = 0;  // so far
  uint64_t taken_ = 0, emptied_ = 0;                    // by the receiver, when last looked at
  bool lost_some_ = false;
};

}  // namespace pycoll::cpu
