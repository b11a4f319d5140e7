#include "cpu/mail_lane.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/atomic.h"
#include "cpu/error.h"
#include "cpu/kernels.h"
#include "cpu/os.h"

namespace pycoll::cpu {

namespace {

void check_sound(bool sound, const Pair& p) {
  if (sound) return;
  throw Error(ErrorKind::kError, "pycoll: what ranks " + std::to_string(p.rank) + " and " + std::to_string(p.peer) +
                                     " share of their messages is damaged: something has written into memory that is "
                                     "not its own");
}

void remove(std::vector<LetterPtr>& from, const LetterPtr& letter) {
  from.erase(std::find(from.begin(), from.end(), letter));
}

LetterPtr find(const std::vector<LetterPtr>& in, uint64_t number) {
  const auto i = std::find_if(in.begin(), in.end(), [&](const LetterPtr& l) { return l->number == number; });
  return i == in.end() ? nullptr : *i;
}

template <class List>
void end_all(List& letters, Books& books, const std::exception_ptr& failure) {
  for (const LetterPtr& letter : letters) books.end(letter, failure);
  letters.clear();
}

// All but the one whose chunks a GPU still moves.
void end_all_but(Moving& moving, std::vector<LetterPtr>& letters, Books& books, const std::exception_ptr& failure,
                 bool at_once) {
  if (moving.letter && (at_once || moves_ended(*moving.letter))) moving = {};
  const LetterPtr held = moving.letter;
  if (held) remove(letters, held);
  end_all(letters, books, failure);
  if (held) letters.push_back(held);
}

}  // namespace

void ring(Doorbell& bell) {
  fetch_add_seq_cst(bell.rings, uint64_t{1});
  futex_wake_all(bell.rings);
}

void Pair::post(Mailbox::Counter& counter, uint64_t value) const {
  exchange_seq_cst(counter.value, value);
  if (load_seq_cst(bell.sleepers) != 0) ring(bell);
}

bool moves_ended(const Letter& letter) {
  try {
    return letter.message.mover->done();
  } catch (...) {
    return true;
  }
}

// ---- sending ----

void Outbox::advance(Step& step) {
  announce(step);
  read_grants(step);
  give_chunks(step);
}

void Outbox::announce(Step& step) {
  while (!waiting_.empty()) {
    const uint64_t n = posted_ + 1;
    if (n - taken_ > Mailbox::kEnvelopes) taken_ = load_seq_cst(p_.theirs.taken.value);
    if (n - taken_ > Mailbox::kEnvelopes) return;
    const LetterPtr letter = waiting_.front();
    const Message& m = letter->message;
    const bool small = m.bytes == 0 || (m.mover == nullptr && m.bytes <= Envelope::kRoom);
    Envelope& envelope = p_.mine.envelopes[n % Mailbox::kEnvelopes];
    envelope.bytes = m.bytes;
    envelope.kind = m.kind;
    envelope.tag = m.tag;
    envelope.small = small;
    if (small) kernels().copy(envelope.contents, m.data, m.bytes);
    letter->number = posted_ = n;
    p_.post(p_.mine.posted, n);
    if (small) {
      step.books.end(letter);
    } else {
      announced_.push_back(letter);
    }
    waiting_.pop_front();
    step.moved = true;
  }
}

void Outbox::read_grants(Step& step) {
  if (announced_.empty() && !lost_some_) return;
  const uint64_t granted = load_seq_cst(p_.theirs.granted.value);
  while (grants_read_ < granted) {
    const uint64_t number = p_.theirs.grants[(grants_read_ + 1) % Mailbox::kGrants];
    ++grants_read_;
    const LetterPtr letter = find(announced_, number);
    if (!letter && lost_some_) continue;
    check_sound(letter != nullptr, p_);
    granted_.push_back(letter);
    remove(announced_, letter);
    step.moved = true;
  }
}

// At most as many chunks as there are buffers: other lanes wait.
void Outbox::give_chunks(Step& step) {
  if (granted_.empty() || !settle(step)) return;
  for (uint64_t i = 0; i < Mailbox::kBuffers && has_room(); ++i) {
    const LetterPtr letter = next_to_give(step);
    if (!letter) break;
    give(letter, step);
  }
  (void)settle(step);
}

bool Outbox::has_room() {
  const uint64_t next = filled_ + moving_.chunks + 1;
  if (next - emptied_ > Mailbox::kBuffers) emptied_ = load_seq_cst(p_.theirs.emptied.value);
  return next - emptied_ <= Mailbox::kBuffers;
}

LetterPtr Outbox::next_to_give(Step& step) {
  if (moving_.letter) {  // half of the buffers at a time: the receiver empties the others meanwhile
    return moving_.letter->left() > 0 && moving_.chunks < Mailbox::kBuffers / 2 ? moving_.letter : nullptr;
  }
  for (const LetterPtr& letter : granted_) {
    if (letter->is_ready()) return letter;
    step.awaits_gpu = true;
  }
  return nullptr;
}

void Outbox::give(const LetterPtr& letter, Step& step) {
  const uint64_t chunk = filled_ + moving_.chunks + 1;
  const size_t bytes = std::min(letter->left(), p_.buffer_bytes);
  std::byte* const buffer = p_.mine.buffer(chunk, p_.buffer_bytes);
  p_.mine.chunk_of[chunk % Mailbox::kBuffers] = letter->number;
  if (Mover* const mover = letter->message.mover) {
    moving_.letter = letter;
    mover->copy(buffer, letter->at(letter->moved), bytes);
    letter->moved += bytes;
    ++moving_.chunks;
  } else {
    kernels().copy(buffer, letter->at(letter->moved), bytes);
    letter->moved += bytes;
    post_chunks(letter, 1, step);
  }
  step.moved = true;
}

// Posts what a GPU has moved. False: it has not.
bool Outbox::settle(Step& step) {
  if (!moving_.ended()) {
    step.moving = step.awaits_gpu = true;
    return false;
  }
  if (moving_.letter) {
    const Moving moved = std::exchange(moving_, {});
    post_chunks(moved.letter, moved.chunks, step);
  }
  return true;
}

void Outbox::post_chunks(const LetterPtr& letter, uint64_t chunks, Step& step) {
  filled_ += chunks;
  p_.post(p_.mine.filled, filled_);
  step.moved = true;
  if (letter->left() > 0) return;
  const LetterPtr ended = letter;
  remove(granted_, ended);
  step.books.end(ended);
}

void Outbox::lose_what_is_not_granted(Step& step, const std::exception_ptr& failure) {
  if (waiting_.empty() && announced_.empty()) return;
  read_grants(step);
  lost_some_ = true;
  end_all(waiting_, step.books, failure);
  end_all(announced_, step.books, failure);
}

void Outbox::give_up(Books& books, const std::exception_ptr& failure, bool at_once) {
  end_all(waiting_, books, failure);
  end_all(announced_, books, failure);
  end_all_but(moving_, granted_, books, failure, at_once);
}

// ---- receiving ----

void Inbox::advance(Step& step) {
  take_envelopes(step);
  if (!landing_.empty()) land(step);
  if (!met_.empty()) grant(step);
  if (!receiving_.empty()) read_chunks(step);
}

void Inbox::take_envelopes(Step& step) {
  if (!matching_.wanted(p_.peer)) return;
  const uint64_t posted = load_seq_cst(p_.theirs.posted.value);
  if (posted == taken_) return;
  check_sound(posted - taken_ <= Mailbox::kEnvelopes, p_);
  while (taken_ < posted && matching_.wanted(p_.peer)) {
    const uint64_t n = taken_ + 1;
    const Envelope& e = p_.theirs.envelopes[n % Mailbox::kEnvelopes];
    const Announced message{p_.peer, n, e.bytes, e.kind, e.tag, e.small != 0, e.contents, {}};
    check_sound(!message.small || message.bytes <= Envelope::kRoom, p_);
    if (const LetterPtr letter = matching_.answer(message)) meet(letter, message, step);
    taken_ = n;
  }
  p_.post(p_.mine.taken, taken_);
  step.moved = true;
}

void Inbox::meet(const LetterPtr& letter, const Announced& message, Step& step) {
  const Message& m = letter->message;
  letter->source = p_.peer;
  letter->number = message.number;
  answered_any_ |= m.peer == kAnySource;
  if (message.bytes != m.bytes || message.kind != m.kind) {
    met_.push_back(letter);
    const std::string sizes = message.bytes == m.bytes ? std::to_string(m.bytes) + " bytes of another element type"
                                                       : std::to_string(message.bytes) + " bytes";
    throw Error(ErrorKind::kMismatch, "pycoll: rank " + std::to_string(p_.rank) + " receives " +
                                          std::to_string(m.bytes) + " bytes from rank " + std::to_string(p_.peer) +
                                          " with tag " + std::to_string(m.tag) + ", which sent " + sizes);
  }
  if (!message.small) return met_.push_back(letter);
  const std::byte* const contents = message.contents ? message.contents : message.kept.data();
  if (m.mover && m.bytes > 0) {
    letter->kept.assign(contents, contents + m.bytes);
    return landing_.push_back(letter);
  }
  kernels().copy(m.data, contents, m.bytes);
  step.books.end(letter);
}

void Inbox::land(Step& step) {
  for (size_t i = 0; i < landing_.size();) {
    const LetterPtr letter = landing_[i];
    Mover& mover = *letter->message.mover;
    if (letter->is_ready() && letter->left() > 0) {
      letter->moved = letter->message.bytes;
      mover.copy(letter->message.data, letter->kept.data(), letter->message.bytes);
    }
    if (letter->left() > 0 || !mover.done()) {
      step.awaits_gpu = true;
      ++i;
      continue;
    }
    landing_.erase(landing_.begin() + i);
    step.books.end(letter);
    step.moved = true;
  }
}

void Inbox::grant(Step& step) {
  for (auto i = met_.begin(); i != met_.end() && receiving_.size() < Mailbox::kGrants;) {
    const LetterPtr letter = *i;
    if (!letter->is_ready()) {
      step.awaits_gpu = true;
      ++i;
      continue;
    }
    receiving_.push_back(letter);
    i = met_.erase(i);
    ++granted_;
    p_.mine.grants[granted_ % Mailbox::kGrants] = letter->number;
    p_.post(p_.mine.granted, granted_);
    step.moved = true;
  }
}

void Inbox::read_chunks(Step& step) {
  if (!settle(step)) return;
  const uint64_t filled = load_seq_cst(p_.theirs.filled.value);
  check_sound(filled - emptied_ <= Mailbox::kBuffers, p_);
  while (emptied_ + moving_.chunks < filled && read_chunk(emptied_ + moving_.chunks + 1, step)) {
  }
  (void)settle(step);
}

// False: it must wait for a GPU that moves what comes before.
bool Inbox::read_chunk(uint64_t chunk, Step& step) {
  const LetterPtr letter = find(receiving_, p_.theirs.chunk_of[chunk % Mailbox::kBuffers]);
  check_sound(letter && letter->left() > 0, p_);
  if (moving_.letter && moving_.letter != letter) return false;
  const size_t bytes = std::min(letter->left(), p_.buffer_bytes);
  const std::byte* const buffer = p_.theirs.buffer(chunk, p_.buffer_bytes);
  if (Mover* const mover = letter->message.mover) {
    moving_.letter = letter;
    mover->copy(letter->at(letter->moved), buffer, bytes);
    ++moving_.chunks;
  } else {
    // Of what does not fit into the caches, with what the sender reads, nobody finds anything there.
    const bool large = 2 * letter->message.bytes > last_level_cache();
    (large ? kernels().stream : kernels().copy)(letter->at(letter->moved), buffer, bytes);
    p_.post(p_.mine.emptied, ++emptied_);
  }
  letter->moved += bytes;
  step.moved = true;
  if (!moving_.letter && letter->left() == 0) finish(letter, step);
  return true;
}

bool Inbox::settle(Step& step) {
  if (!moving_.ended()) {
    step.moving = step.awaits_gpu = true;
    return false;
  }
  if (moving_.letter) {
    const Moving moved = std::exchange(moving_, {});
    emptied_ += moved.chunks;
    p_.post(p_.mine.emptied, emptied_);
    step.moved = true;
    if (moved.letter->left() == 0) finish(moved.letter, step);
  }
  return true;
}

void Inbox::finish(const LetterPtr& letter, Step& step) {
  remove(receiving_, letter);
  step.books.end(letter);
}

void Inbox::give_up(Books& books, const std::exception_ptr& failure, bool at_once) {
  end_all(met_, books, failure);
  end_all_but(moving_, receiving_, books, failure, at_once);
  for (size_t i = 0; i < landing_.size();) {
    const LetterPtr letter = landing_[i];
    if (!at_once && letter->left() == 0 && !moves_ended(*letter)) {
      ++i;
      continue;
    }
    landing_.erase(landing_.begin() + i);
    books.end(letter, failure);
  }
}

}  // namespace pycoll::cpu
