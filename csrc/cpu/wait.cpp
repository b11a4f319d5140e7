#include "cpu/wait.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace pycoll::cpu {

namespace {
std::atomic<void (*)()> interrupt_check{nullptr};
}  // namespace

void set_interrupt_check(void (*check)()) { interrupt_check = check; }

void check_interrupt() {
  if (auto* check = interrupt_check.load()) check();
}

void Watch::throw_failure_of(int rank) const {
  const Control& c = a_.control(rank);
  if (load_acquire(c.failed) == 0) return;
  const auto patience = Clock::now() + kLongestSleep;
  while (load_acquire(c.failed) != 2) {  // being written, by a few stores
    if (Clock::now() > patience)
      throw Error(ErrorKind::kError, "pycoll: rank " + std::to_string(rank) + " has failed", rank);
    relax();
  }
  throw Error(static_cast<ErrorKind>(c.kind), c.text, c.culprit);
}

void Watch::throw_if_failed() const { throw_failure_of(a_.rank); }

void Watch::throw_if_any_rank_failed() const {
  for (int r = 0; r < a_.geometry.world; ++r) throw_failure_of(r);
}

void Watch::throw_if_any_rank_is_lost() const {
  throw_if_any_rank_failed();
  for (int r = 0; r < a_.geometry.world; ++r) {
    if (r != a_.rank && fate(r) == Fate::kDead) throw lost(r, Fate::kDead);
  }
}

void Watch::waits_for(int peer) const { store_release(a_.control(a_.rank).waits_for, static_cast<uint32_t>(peer + 1)); }
void Watch::mail_waits_for(int peer) const {
  store_release(a_.control(a_.rank).mail_waits_for, static_cast<uint32_t>(peer + 1));
}

void Watch::look(std::span<const Awaited> missing, Clock::time_point deadline,
                 std::chrono::milliseconds timeout) const {
  const bool late = Clock::now() > deadline;
  for (int r = 0; r < a_.geometry.world; ++r) {
    if (load_acquire(a_.control(r).failed) == 0) continue;
    if (std::all_of(missing.begin(), missing.end(), [](const Awaited& w) { return w.here(); })) return;
    throw_failure_of(r);
  }
  for (const Awaited& awaited : missing) look_at(awaited);
  for (const Awaited& awaited : missing) {
    if (late && !awaited.here()) throw this->late(awaited.peer, timeout, "");
  }
}

void Watch::look_at(const Awaited& awaited) const {
  // The news first, the cell after it: what a rank did before it died or left still counts.
  const Fate news = fate(awaited.peer);
  if (news == Fate::kHere || awaited.here()) return;
  throw lost(awaited.peer, news);
}

Watch::Fate Watch::fate(int rank) const {
  const Life life = a_.liveness[rank].look();
  if (load_acquire(a_.control(rank).departed) != 0 || life == Life::kLeft) return Fate::kLeft;
  return life == Life::kDead ? Fate::kDead : Fate::kHere;
}

Error Watch::lost(int rank, Fate fate) const {
  try {  // who fails and then goes has failed
    throw_failure_of(rank);
  } catch (const Error& failure) {
    return failure;
  }
  const std::string who = "pycoll: rank " + std::to_string(rank);
  if (fate == Fate::kDead) return Error(ErrorKind::kPeerLost, who + " is lost: its process has died", rank);
  return Error(ErrorKind::kPeerLost,
               who + " has left: it closed its communicator while rank " + std::to_string(a_.rank) +
                   " still waits for it. Do all ranks make the same calls?",
               rank);
}

Error Watch::late(int peer, std::chrono::milliseconds timeout, const std::string& doing) const {
  int culprit = peer;  // who may itself be waiting for another, and so on: the last of the chain holds up all
  for (int i = 0; culprit >= 0 && i < a_.geometry.world; ++i) {
    const Control& c = a_.control(culprit);
    const uint32_t in_collective = load_acquire(c.waits_for);
    const uint32_t next = in_collective != 0 ? in_collective : load_acquire(c.mail_waits_for);
    if (next == 0 || next > static_cast<uint32_t>(a_.geometry.world) || static_cast<int>(next) - 1 == a_.rank) break;
    culprit = static_cast<int>(next) - 1;
  }
  const std::string who =
      culprit < 0 ? "any rank: none came" : "rank " + std::to_string(culprit) + ", which is alive but did not come";
  return Error(ErrorKind::kTimeout,
               "pycoll: rank " + std::to_string(a_.rank) + " waited " + std::to_string(timeout.count()) + " ms" +
                   doing + " for " + who + ". Did it make this call? Raise the timeout if it is slow",
               culprit);
}

Error Watch::fail(const Error& error) const {
  Control& c = a_.control(a_.rank);
  if (!compare_exchange(c.failed, uint32_t{0}, uint32_t{1})) {
    try {
      throw_failure_of(a_.rank);
    } catch (const Error& first) {
      return first;
    }
  }
  c.kind = static_cast<int32_t>(error.kind);
  c.culprit = error.rank;
  std::snprintf(c.text, sizeof(c.text), "%s", error.what());
  exchange_seq_cst(c.failed, uint32_t{2});  // before anything the caller does to its tensors after the error
  return error;
}

void Waiter::await_barrier_slowly(const PeerTable& table, int channel, uint64_t epoch) {
  std::vector<Awaited> missing;
  for (int r = 0; r < table.geometry.world; ++r) {
    const Awaited awaited{&table.barrier_cell(r, channel, epoch), epoch, r};
    if (r != table.rank && !awaited.here()) missing.push_back(awaited);
  }
  await_slowly(missing);
}

void Waiter::await_slowly(std::span<const Awaited> missing) {
  if (deadline_ == Clock::time_point{}) deadline_ = Clock::now() + timeout_;
  for (; !missing.empty(); missing = missing.subspan(1)) {
    if (!yield_until_here(missing[0])) sleep_until_here(missing);
  }
}

void Waiter::await_moves(Mover& mover) {
  if (deadline_ == Clock::time_point{}) deadline_ = Clock::now() + timeout_;
  const auto begin = Clock::now();
  for (auto looked = begin; !mover.done();) {
    const auto now = Clock::now();
    if (now - begin > kYielding) std::this_thread::sleep_for(kMovesNap);
    if (now - looked < kLongestSleep) continue;
    looked = now;
    watch_.throw_if_any_rank_is_lost();
    if (interruptible_) check_interrupt();
    if (now > deadline_) {
      throw Error(ErrorKind::kTimeout,
                  "pycoll: what comes before the collective on this rank's GPU did not end within " +
                      std::to_string(timeout_.count()) + " ms. Raise the timeout if it takes that long");
    }
  }
}

bool Waiter::yield_until_here(const Awaited& awaited) const {
  const auto begin = Clock::now();
  for (auto before = begin; before - begin < kYielding;) {
    if (awaited.here()) return true;
    sched_yield();
    const auto now = Clock::now();
    if (now - before > kLongTurn) break;
    before = now;
  }
  return awaited.here();
}

void Waiter::sleep_until_here(std::span<const Awaited> missing) const {
  const Awaited& awaited = missing[0];
  uint32_t& sleepers = const_cast<Cell*>(awaited.cell)->sleepers;
  watch_.waits_for(awaited.peer);
  for (auto nap = kFirstSleep; !awaited.here(); nap = std::min(nap * 2, kLongestSleep)) {
    fetch_add_seq_cst(sleepers, uint32_t{1});
    const uint64_t seen = load_seq_cst(awaited.cell->value);
    if (seen < awaited.value) futex_wait(awaited.cell->value, static_cast<uint32_t>(seen), nap);
    fetch_add_seq_cst(sleepers, ~uint32_t{0});
    if (awaited.here()) break;
    watch_.look(missing, deadline_, timeout_);
    if (interruptible_) check_interrupt();
  }
  watch_.waits_for(-1);
}

void wake(Cell& cell) { futex_wake_all(cell.value); }

}  // namespace pycoll::cpu
