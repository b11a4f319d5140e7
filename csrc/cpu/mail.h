// Messages from one rank to another: send and receive on raw memory (csrc/README.md, M1 to M11). csrc/torch wraps it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>

#include "cpu/elsewhere.h"

namespace pycoll::cpu {

struct Letter;     // cpu/mail_letter.h
class PostOffice;  // cpu/mail_office.h

constexpr int kAnySource = -1;

// Dense memory of the caller: read by a send, written by a receive, and the caller's again when the request has ended.
struct Message {
  void* data = nullptr;
  size_t bytes = 0;
  uint64_t kind = 0;      // a fingerprint of the element type; as the size, the same at both ends
  int peer = kAnySource;  // to whom; from whom, where also kAnySource will do
  int tag = 0;            // not negative
  // Memory that the CPU does not move: its copies lead to or from memory of the host, buffers of the mailboxes
  // (PeerTable::mailbox) and others. The message moves only when done() has said so once, so done() speaks also of what
  // comes before the message on its GPU, and nothing else may be asked of the mover from then until the request has
  // ended. It lives as long. Any thread calls it, under a lock: it must call nothing of pycoll's.
  Mover* mover = nullptr;
};

// A send or receive that has been started. Copies mean the same one; it may outlive its communicator, whose close() ends
// it.
class Request {
 public:
  Request() = default;
  explicit Request(std::shared_ptr<Letter> letter) : letter_(std::move(letter)) {}
  explicit operator bool() const { return letter_ != nullptr; }

  bool ended() const;  // well or not. Does first what can be done at once
  // Returns when it has ended, or throws its failure. A request that does not end within the communicator's time-out
  // ends the communicator, with an Error (kTimeout) about the rank that holds it up; one that does not end within a
  // shorter `timeout` is left as it is, with an Error (kTimeout) as well. Lets signals in; what their handlers throw
  // ends the communicator, unless the request is asynchronous, which then goes on.
  void wait(std::optional<std::chrono::milliseconds> timeout = {}) const;
  int source() const;  // the rank that has sent what was received; of a send, to whom

 private:
  std::shared_ptr<Letter> letter_;
};

// A rank's mail. Any number of threads may use it, beside collectives of the same communicator.
class Mail {
 public:
  // Called once, when the request has ended: by the thread that starts it if it ends at once, else by the postman (maybe
  // while wait() returns already) or by who waits for it. In the postman collectives are an error there, close() is an
  // abort, and whoever blocks there holds up the others'.
  using Done = std::function<void(std::exception_ptr failure)>;

  explicit Mail(std::shared_ptr<PostOffice> office) : office_(std::move(office)) {}

  // Both start a message, do what can be done at once, and return. With `done` it is asynchronous: a thread of the
  // communicator, the postman, goes on with it. Without, it goes on while a thread waits for this or another request.
  // Throw Error: kUsage if this cannot be (the communicator stays usable), or what ended the communicator.
  Request send(const Message& message, Done done = {});
  Request receive(const Message& message, Done done = {});

 private:
  std::shared_ptr<PostOffice> office_;
};

}  // namespace pycoll::cpu
