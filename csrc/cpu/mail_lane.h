// What the two lanes between this rank and one other have in common: the one on which it sends (cpu/mail_outbox.h), and the
// one on which it receives (cpu/mail_inbox.h); csrc/README.md, M1, M7, M8. Everything there happens in a step, under the lock
// of the post office; what goes wrong is thrown, and ends the communicator: every letter is in some list then, for give_up().
#pragma once

#include <vector>

#include "core/atomic.h"
#include "core/layout.h"
#include "cpu/mail_letter.h"
#include "cpu/names.h"

namespace pycoll::cpu {

void ring(Doorbell& bell);

// What both lanes of a pair share.
struct Pair {
  int rank, peer;
  const Names& names;
  Mailbox& mine;    // written here, read by the peer
  Mailbox& theirs;  // written by the peer
  Doorbell& bell;   // the peer's
  size_t buffer_bytes;

  void post(Mailbox::Counter& counter, uint64_t value) const {
    exchange_seq_cst(counter.value, value);
    if (load_seq_cst(bell.sleepers) != 0) ring(bell);
  }
  // Throws Error: what the peer has written cannot be.
  void check_sound(bool sound) const {
    if (!sound) throw_damaged();
  }

 private:
  [[noreturn]] void throw_damaged() const;
};

// Chunks that a GPU moves: the last ones of those begun, all of one message.
struct Moving {
  LetterPtr letter;
  uint64_t chunks = 0;

  bool ended() const { return !letter || letter->message.mover->done(); }
};

// Whether its moves are over, for who gives a letter up; a mover that throws will not move anything any more.
bool moves_ended(const Letter& letter);

// The letters of a lane that are in one state.
void remove(std::vector<LetterPtr>& from, const LetterPtr& letter);
LetterPtr find(const std::vector<LetterPtr>& in, uint64_t number);  // null if there is none
template <class List>
void end_all(List& letters, Books& books, const std::exception_ptr& failure) {
  for (const LetterPtr& letter : letters) books.end(letter, failure);
  letters.clear();
}
// All but the one whose chunks a GPU still moves, unless `at_once`.
void end_all_but(Moving& moving, std::vector<LetterPtr>& letters, Books& books, const std::exception_ptr& failure,
                 bool at_once);

}  // namespace pycoll::cpu
