// How a CPU rank waits: spin, then yield, then sleep; and what it looks at meanwhile (csrc/README.md, C3 and F1 to F4).
#pragma once

#include <chrono>

#include "core/atomic.h"
#include "core/cell.h"
#include "cpu/attach.h"
#include "cpu/error.h"

namespace pycoll::cpu {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__("yield");
#endif
}

// How long to wait in which way before the next.
struct Patience {
  int spins;   // looks at the cell, with a pause of the pipeline between
  int yields;  // looks with the core offered to other threads between
};

// One a communicator: what all its waits have in common.
class Watch {
 public:
  Watch(const Attachment& attachment, std::chrono::milliseconds timeout) : a_(attachment), timeout_(timeout) {}

  // Raises if a rank has failed, if `peer` is dead or has left, or if the deadline is over; unless `cell` has the value by now.
  void look(const Cell& cell, uint64_t value, int peer, Clock::time_point deadline) const;

  // Tells the other ranks why this one stops; only the first call counts. Returns what counts.
  Error fail(const Error& error) const;
  void throw_if_failed() const;  // this rank's own failure

  std::chrono::milliseconds timeout() const { return timeout_; }
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }

 private:
  void throw_failure_of(int rank) const;
  const Attachment& a_;
  std::chrono::milliseconds timeout_;
};

// Called by waits of the thread that called pycoll, about every 20 ms; throws to interrupt. (Python's signals: set by csrc/torch.)
void set_interrupt_check(void (*check)());
void check_interrupt();

// One thread's waits within one collective.
class Waiter {
 public:
  Waiter(const Watch& watch, Patience patience, bool interruptible)
      : watch_(watch), patience_(patience), interruptible_(interruptible) {}

  void await(const Cell& cell, uint64_t value, int peer) {
    for (int i = 0; i < patience_.spins; ++i) {
      if (load_acquire(cell.value) >= value) return;
      relax();
    }
    await_slowly(cell, value, peer);
  }

 private:
  void await_slowly(const Cell& cell, uint64_t value, int peer);
  const Watch& watch_;
  const Patience patience_;
  const bool interruptible_;
  Clock::time_point deadline_{};  // of the collective, set by its first slow wait
};

// Announces `value` and wakes whoever sleeps on the cell.
void wake(Cell& cell);
inline void post(Cell& cell, uint64_t value) {
  exchange_seq_cst(cell.value, value);
  if (load_seq_cst(cell.sleepers) != 0) wake(cell);
}

}  // namespace pycoll::cpu
