// How a CPU rank waits: spin, then yield, then sleep; and what it looks at meanwhile (csrc/README.md, C3 and F1 to F4).
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <span>
#include <string>

#include "core/atomic.h"
#include "core/cell.h"
#include "cpu/attach.h"
#include "cpu/elsewhere.h"
#include "cpu/error.h"

namespace pycoll::cpu {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__("yield");
#endif
}

// A cell that must reach a value, and who posts it.
struct Awaited {
  const Cell* cell;
  uint64_t value;
  int peer;

  bool here() const { return load_acquire(cell->value) >= value; }
};

// One a communicator: what all its waits have in common.
class Watch {
 public:
  Watch(const Attachment& attachment, std::chrono::milliseconds timeout) : a_(attachment), timeout_(timeout) {}

  // Raises if a rank has failed, if one that is waited for is dead or has left, or if the deadline, after `timeout`, is
  // over; unless all is here by now.
  void look(std::span<const Awaited> missing, Clock::time_point deadline, std::chrono::milliseconds timeout) const;

  // Raises if any rank has failed or is dead; a rank that has left is not missed.
  void throw_if_any_rank_is_lost() const;

  // Tells the other ranks why this one stops. Only the first failure of a rank counts; returns that one.
  Error fail(const Error& error) const;
  // The same for whatever was thrown; returns what to throw on. `doing`: what a signal's handler interrupted.
  std::exception_ptr fail(const std::exception_ptr& thrown, const std::string& doing) const;
  // Called once, after the others have been told; it must not throw.
  void on_failure(std::function<void(const Error&)> hook) { on_failure_ = std::move(hook); }
  void throw_if_failed() const;  // this rank's failure
  void throw_if_any_rank_failed() const;

  // For waits that are not for cells (cpu/mail_office.h).
  enum class Fate { kHere, kLeft, kDead };
  Fate fate(int rank) const;
  bool failed(int rank) const { return load_acquire(a_.control(rank).failed) != 0; }
  void throw_failure_of(int rank) const;  // if it has one
  Error lost(int rank, Fate fate) const;
  // `doing`: what this rank does meanwhile. `peer`: -1 where any could have come.
  Error late(int peer, std::chrono::milliseconds timeout, const std::string& doing) const;

  static constexpr int kNobody = -1, kAnybody = -2;

  // Names the rank that this one waits for, so that a time-out can follow the chain to the rank that holds up all. Said
  // again about every 20 ms while it waits: a rank that is stopped says so no longer.
  void waits_for(int peer) const;
  void mail_waits_for(int peer) const;  // the same of sends and receives, which go on beside collectives
  // Whom a rank waits for, as it has said within the last `patience`.
  int awaited_by(int rank, std::chrono::milliseconds patience) const;

  const Names& names() const { return a_.names; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }

 private:
  void look_at(const Awaited& awaited) const;

  const Attachment& a_;
  std::atomic<std::chrono::milliseconds> timeout_;  // set by one thread, read by others
  std::function<void(const Error&)> on_failure_;
};

constexpr auto kMovesNap = std::chrono::microseconds(20);  // while a GPU moves something
constexpr auto kFirstSleep = std::chrono::microseconds(1000), kLongestSleep = std::chrono::microseconds(20000);
// Yielding is measured in time, not in turns: beside busy threads one turn can take 20 ms, and then sleeping costs
// less.
constexpr auto kYielding = std::chrono::microseconds(200), kLongTurn = std::chrono::microseconds(100);

// Called by waits of the thread that called pycoll, about every 20 ms; throws to interrupt. (Python's signals: set by
// csrc/torch.)
void set_interrupt_check(void (*check)());
void check_interrupt();

// One thread's waits within one collective.
class Waiter {
 public:
  // `spins`: looks at a cell, with a pause of the pipeline between, before the core is offered to other threads.
  Waiter(const Watch& watch, std::chrono::milliseconds timeout, int spins, bool interruptible)
      : watch_(watch), timeout_(timeout), spins_(spins), interruptible_(interruptible) {}

  void await(const Cell& cell, uint64_t value, int peer) {
    const Awaited awaited{&cell, value, peer};
    if (!spin(awaited)) await_slowly({&awaited, 1});
  }

  const Names& names() const { return watch_.names(); }

  // Until this rank's own GPU has moved what it was asked to.
  void await_moves(Mover& mover);

  // Until all other ranks have posted barrier `epoch` of the channel.
  void await_barrier(const PeerTable& table, int channel, uint64_t epoch) {
    for (int i = 1; i < table.geometry.world; ++i) {
      const int peer = (table.rank + i) % table.geometry.world;
      if (!spin({&table.barrier_cell(peer, channel, epoch), epoch, peer}))
        return await_barrier_slowly(table, channel, epoch);
    }
  }

 private:
  bool spin(const Awaited& awaited) const {
    for (int i = 0; i < spins_; ++i) {
      if (awaited.here()) return true;
      relax();
    }
    return awaited.here();
  }
  void await_barrier_slowly(const PeerTable& table, int channel, uint64_t epoch);
  void await_slowly(std::span<const Awaited> missing);
  bool yield_until_here(const Awaited& awaited) const;
  void sleep_until_here(std::span<const Awaited> missing) const;

  const Watch& watch_;
  const std::chrono::milliseconds timeout_;
  const int spins_;
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
