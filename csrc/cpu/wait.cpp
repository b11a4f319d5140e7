#include "cpu/wait.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

namespace pycoll::cpu {

namespace {
std::atomic<void (*)()> interrupt_check{nullptr};
constexpr auto kLongestSleep = std::chrono::microseconds(20000);
constexpr int kYieldsPerLook = 256;
}  // namespace

void set_interrupt_check(void (*check)()) { interrupt_check = check; }

void check_interrupt() {
  if (auto* check = interrupt_check.load()) check();
}

void Watch::throw_failure_of(int rank) const {
  const Control& c = a_.control(rank);
  if (load_acquire(c.failed) != 2) return;
  throw Error(static_cast<ErrorKind>(c.kind), c.text, c.culprit);
}

void Watch::throw_if_failed() const { throw_failure_of(a_.rank); }

void Watch::look(const Cell& cell, uint64_t value, int peer, Clock::time_point deadline) const {
  // The news first, the cell after it: what a rank did before it failed or died still counts.
  const Life life = a_.liveness[peer].look();
  const bool left = load_acquire(a_.control(peer).departed) != 0 || life == Life::kLeft;
  const bool late = Clock::now() > deadline;
  int failed = -1;
  for (int r = 0; r < a_.geometry.world && failed < 0; ++r) {
    if (load_acquire(a_.control(r).failed) == 2) failed = r;
  }
  if (load_acquire(cell.value) >= value) return;
  if (failed >= 0) throw_failure_of(failed);
  const std::string who = "rank " + std::to_string(peer);
  if (life == Life::kDead) {
    throw Error(ErrorKind::kPeerLost, "pycoll: " + who + " is lost: its process has died", peer);
  }
  if (left) {
    throw Error(ErrorKind::kPeerLost,
                "pycoll: " + who + " has left: it closed its communicator while rank " + std::to_string(a_.rank) +
                    " still waits for it. Do all ranks make the same calls?",
                peer);
  }
  if (late) {
    throw Error(ErrorKind::kTimeout,
                "pycoll: rank " + std::to_string(a_.rank) + " waited " + std::to_string(timeout_.count()) + " ms for " + who +
                    ", which is alive but did not come. Did it make this call? Raise `timeout` if it is slow",
                peer);
  }
}

Error Watch::fail(const Error& error) const {
  Control& c = a_.control(a_.rank);
  if (!compare_exchange(c.failed, uint32_t{0}, uint32_t{1})) {
    while (load_acquire(c.failed) != 2) relax();  // another thread of this rank is at the few stores below
    return Error(static_cast<ErrorKind>(c.kind), c.text, c.culprit);
  }
  c.kind = static_cast<int32_t>(error.kind);
  c.culprit = error.rank;
  std::snprintf(c.text, sizeof(c.text), "%s", error.what());
  store_release(c.failed, uint32_t{2});
  return error;
}

void Waiter::await_slowly(const Cell& cell, uint64_t value, int peer) {
  if (deadline_ == Clock::time_point{}) deadline_ = Clock::now() + watch_.timeout();
  for (int i = 1; i <= patience_.yields; ++i) {
    if (load_acquire(cell.value) >= value) return;
    sched_yield();
    if (i % kYieldsPerLook == 0) watch_.look(cell, value, peer, deadline_);
  }
  auto nap = std::chrono::microseconds(1000);
  uint32_t& sleepers = const_cast<Cell&>(cell).sleepers;
  while (load_acquire(cell.value) < value) {
    fetch_add_seq_cst(sleepers, uint32_t{1});
    const uint64_t seen = load_seq_cst(cell.value);
    if (seen < value) futex_wait(cell.value, static_cast<uint32_t>(seen), nap);
    fetch_add_seq_cst(sleepers, ~uint32_t{0});
    if (load_acquire(cell.value) >= value) return;
    watch_.look(cell, value, peer, deadline_);
    if (interruptible_) check_interrupt();
    nap = std::min(nap * 2, kLongestSleep);
  }
}

void wake(Cell& cell) { futex_wake_all(cell.value); }

}  // namespace pycoll::cpu
