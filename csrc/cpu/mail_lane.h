// The two lanes between this rank and one other: the one on which it sends, and the one on which it receives
// (csrc/README.md, M1 to M5, M7). Everything here happens in a step, under the lock of the post office; what goes wrong is
// thrown, and ends the communicator: every letter is in some list then, for give_up().
#pragma once

#include <deque>
#include <vector>

#include "core/layout.h"
#include "cpu/mail_match.h"

namespace pycoll::cpu {

// What both lanes of a pair share.
struct Pair {
  int rank, peer;
  Mailbox& mine;    // written here, read by the peer
  Mailbox& theirs;  // written by the peer
  Doorbell& bell;   // the peer's
  size_t buffer_bytes;

  void post(Mailbox::Counter& counter, uint64_t value) const;
};
void ring(Doorbell& bell);

// Chunks that a GPU moves: the last ones of those begun, all of one message.
struct Moving {
  LetterPtr letter;
  uint64_t chunks = 0;

  bool ended() const { return !letter || letter->message.mover->done(); }
};

// Whether its moves are over, for who gives a letter up; a mover that throws will not move anything any more.
bool moves_ended(const Letter& letter);

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
