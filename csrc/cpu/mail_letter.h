// One send or receive under way, and the books that a rank keeps of all of them. All of it is touched under the lock of
// the post office alone, but for what is said to be atomic or constant.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/mail.h"
#include "cpu/recorder.h"

namespace pycoll::cpu {

struct Letter {
  Letter(const Message& m, bool out, Mail::Done d, std::shared_ptr<PostOffice> o)
      : message(m),
        outgoing(out),
        asynchronous(d != nullptr),
        office(std::move(o)),
        done(std::move(d)),
        source(out ? m.peer : kAnySource) {}

  const Message message;
  const bool outgoing, asynchronous;
  const std::shared_ptr<PostOffice> office;

  Mail::Done done;              // asynchronous only, until it is called
  uint64_t number = 0;          // of its lane, once announced or met
  uint64_t entry = 0;           // of the recorder
  int source;                   // of a receive: kAnySource until it has met its message
  size_t moved = 0;             // bytes
  bool ready = false;           // its mover has done what came before the message
  std::vector<std::byte> kept;  // a small message on its way into memory that the CPU does not write
  std::exception_ptr failure;   // constant once it has ended
  std::atomic<bool> ended{false};

  std::byte* at(size_t offset) const { return static_cast<std::byte*>(message.data) + offset; }
  size_t left() const { return message.bytes - moved; }
  bool is_ready() { return ready = ready || message.mover == nullptr || message.mover->done(); }
};
using LetterPtr = std::shared_ptr<Letter>;

struct Books {
  explicit Books(Journal& journal) : recorder(journal) {}

  size_t open = 0, asynchronous = 0;  // requests that have not ended, and those of them that have a `done`
  std::vector<LetterPtr> finished;    // their `done` is to be called
  Recorder recorder;

  void begin(const LetterPtr& letter) {
    ++open;
    asynchronous += letter->asynchronous;
    const Message& m = letter->message;
    Entry entry;
    entry.sequence = recorder.count();
    entry.count = m.bytes;
    entry.shape = m.kind;
    entry.peer = m.peer;
    entry.tag = m.tag;
    entry.deed = letter->outgoing ? Deed::kSend : Deed::kReceive;
    entry.flags = static_cast<uint8_t>((letter->asynchronous ? Entry::kQueued : 0) | (m.mover ? Entry::kOnGpu : 0));
    letter->entry = recorder.begin(entry);
  }
  void end(const LetterPtr& letter, std::exception_ptr failure = nullptr) {
    if (letter->message.peer == kAnySource) recorder.set_peer(letter->entry, letter->source, letter->message.tag);
    recorder.end(letter->entry, failure != nullptr);
    if (letter->asynchronous) finished.push_back(letter);
    --open;
    asynchronous -= letter->asynchronous;
    letter->failure = std::move(failure);
    letter->ended.store(true, std::memory_order_release);
  }
};

// What one step does (M6).
struct Step {
  Books& books;
  bool moved = false;       // something
  bool moving = false;      // a GPU moves something that a later step is to announce
  bool awaits_gpu = false;  // the same, or a GPU has not come to a message yet
};

}  // namespace pycoll::cpu
