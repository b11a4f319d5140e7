// Whether a process lives: known at once, and never guessed from slowness.
//
// Each process that has communicators runs one *keeper* thread, which holds a robust mutex in a page of shared memory
// for as long as there are communicators. Peers map the page and try the lock. The kernel marks the mutex when the
// keeper dies with it, be it by SIGKILL, and also if a forked child of the process lives on; a stopped or a slow
// process keeps it. The first watcher that learns of a death writes it beside the mutex, since the mutex itself tells
// it only once or twice. (Before Linux 5.18 an out-of-memory kill could hide from robust mutexes: then the time-out
// speaks.)
#pragma once

#include <memory>

#include "cpu/os.h"

namespace pycoll::cpu {

enum class Life { kAlive, kDead, kLeft };  // left: ended all its communicators in order

class Keeper {
 public:
  // This process's keeper; starts it if it does not run. It ends with the last reference.
  static std::shared_ptr<Keeper> get();
  ~Keeper();
  int page_fd() const;  // to hand to peers

  struct State;  // private: the thread and its page

 private:
  Keeper();
  std::unique_ptr<State> state_;
};

// A peer's page, as this process maps it.
class PeerLiveness {
 public:
  PeerLiveness() = default;
  explicit PeerLiveness(const Fd& page);
  Life look() const;

 private:
  Mapping page_;
};

}  // namespace pycoll::cpu
