#include "cpu/mail_lane.h"

#include <algorithm>
#include <string>

#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

void ring(Doorbell& bell) {
  fetch_add_seq_cst(bell.rings, uint64_t{1});
  futex_wake_all(bell.rings);
}

void Pair::throw_damaged() const {
  throw Error(ErrorKind::kError, "pycoll: what ranks " + names.numbers({rank, peer}, " and ") +
                                     " share of their messages is damaged: something has written into memory that is "
                                     "not its own");
}

bool moves_ended(const Letter& letter) {
  try {
    return letter.message.mover->done();
  } catch (...) {
    return true;
  }
}

void remove(std::vector<LetterPtr>& from, const LetterPtr& letter) {
  from.erase(std::find(from.begin(), from.end(), letter));
}

LetterPtr find(const std::vector<LetterPtr>& in, uint64_t number) {
  const auto i = std::find_if(in.begin(), in.end(), [&](const LetterPtr& l) { return l->number == number; });
  return i == in.end() ? nullptr : *i;
}

void end_all_but(Moving& moving, std::vector<LetterPtr>& letters, Books& books, const std::exception_ptr& failure,
                 bool at_once) {
  if (moving.letter && (at_once || moves_ended(*moving.letter))) moving = {};
  const LetterPtr held = moving.letter;
  if (held) remove(letters, held);
  end_all(letters, books, failure);
  if (held) letters.push_back(held);
}

}  // namespace pycoll::cpu
