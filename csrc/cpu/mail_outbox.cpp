#include "cpu/mail_outbox.h"

#include <algorithm>
#include <utility>

#include "cpu/kernels.h"

namespace pycoll::cpu {

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
    p_.check_sound(letter != nullptr);
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

}  // namespace pycoll::cpu
