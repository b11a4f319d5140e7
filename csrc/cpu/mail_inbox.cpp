#include "cpu/mail_inbox.h"

#include <algorithm>
#include <string>

#include "cpu/error.h"
#include "cpu/kernels.h"
#include "cpu/os.h"

namespace pycoll::cpu {

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
  p_.check_sound(posted - taken_ <= Mailbox::kEnvelopes);
  while (taken_ < posted && matching_.wanted(p_.peer)) {
    const uint64_t n = taken_ + 1;
    const Envelope& e = p_.theirs.envelopes[n % Mailbox::kEnvelopes];
    const Announced message{p_.peer, n, e.bytes, e.kind, e.tag, e.small != 0, e.contents, {}};
    p_.check_sound(!message.small || message.bytes <= Envelope::kRoom);
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
    throw Error(ErrorKind::kMismatch, "pycoll: " + p_.names.rank(p_.rank) + " receives " + std::to_string(m.bytes) +
                                          " bytes from " + p_.names.rank(p_.peer) + " with tag " +
                                          std::to_string(m.tag) + ", which sent " + sizes);
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
  p_.check_sound(filled - emptied_ <= Mailbox::kBuffers);
  while (emptied_ + moving_.chunks < filled && read_chunk(emptied_ + moving_.chunks + 1, step)) {
  }
  (void)settle(step);
}

// False: it must wait for a GPU that moves what comes before.
bool Inbox::read_chunk(uint64_t chunk, Step& step) {
  const LetterPtr letter = find(receiving_, p_.theirs.chunk_of[chunk % Mailbox::kBuffers]);
  p_.check_sound(letter && letter->left() > 0);
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
    if (large) kernels().drain();
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
