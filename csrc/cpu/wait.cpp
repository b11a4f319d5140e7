#include "cpu/wait.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace pycoll::cpu {

namespace {
std::atomic<void (*)()> interrupt_check{nullptr};

// A word that says whom a rank waits for: one more than the rank, 0 for nobody, all bits for anybody, under the time in
// milliseconds.
constexpr int kRankBits = 16;
constexpr uint64_t kRankMask = (1 << kRankBits) - 1;

uint64_t milliseconds_now() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch()).count());
}

uint64_t word_of_wait(int peer) {
  if (peer == Watch::kNobody) return 0;
  return milliseconds_now() << kRankBits | (peer == Watch::kAnybody ? kRankMask : static_cast<uint64_t>(peer + 1));
}
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
    if (Clock::now() > patience) throw Error(ErrorKind::kError, "pycoll: " + a_.names.rank(rank) + " has failed", rank);
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

void Watch::waits_for(int peer) const { store_release(a_.control(a_.rank).waits_for, word_of_wait(peer)); }
void Watch::mail_waits_for(int peer) const { store_release(a_.control(a_.rank).mail_waits_for, word_of_wait(peer)); }

int Watch::awaited_by(int rank, std::chrono::milliseconds patience) const {
  const Control& c = a_.control(rank);
  for (const uint64_t* said : {&c.waits_for, &c.mail_waits_for}) {
    const uint64_t word = load_acquire(*said), peer = word & kRankMask;
    if (peer == 0 || (peer > static_cast<uint64_t>(a_.geometry.world) && peer != kRankMask)) continue;
    const auto age = static_cast<int64_t>(milliseconds_now() - (word >> kRankBits));
    if (age <= patience.count()) return peer == kRankMask ? kAnybody : static_cast<int>(peer) - 1;
  }
  return kNobody;
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
  const std::string who = "pycoll: " + a_.names.rank(rank);
  if (fate == Fate::kDead) return Error(ErrorKind::kPeerLost, who + " is lost: its process has died", rank);
  return Error(ErrorKind::kPeerLost,
               who + " has left: it closed its communicator while " + a_.names.rank(a_.rank) +
                   " still waits for it. Do all ranks make the same calls?",
               rank);
}

Error Watch::late(int peer, std::chrono::milliseconds timeout, const std::string& doing) const {
  // Who may itself be waiting for another, and so on: the last of the chain holds up all. Whoever has not said for long
  // that it still waits does not run: it may have been stopped in a wait that would have ended meanwhile.
  const auto patience = std::min(timeout / 2, std::chrono::milliseconds(500));
  int culprit = peer, next = kNobody;
  for (int i = 0; culprit >= 0 && i < a_.geometry.world; ++i) {
    next = awaited_by(culprit, patience);
    if (next < 0 || next == a_.rank) break;
    culprit = next;
  }
  std::string who = culprit < 0 ? "any rank: none came" : a_.names.rank(culprit) + ", which is alive but did not come";
  if (next == kAnybody) {  // who is to blame nobody can tell
    who = a_.names.rank(culprit) + ", which waits to receive from any rank: none came";
    culprit = -1;
  }
  return Error(ErrorKind::kTimeout,
               "pycoll: " + a_.names.rank(a_.rank) + " waited " + std::to_string(timeout.count()) + " ms" + doing +
                   " for " + who + ". Did it make this call? Raise the timeout if it is slow",
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
  const std::string text = error.what();
  size_t end = std::min(text.size(), sizeof(c.text) - 1);
  while (end > 0 && end < text.size() && (text[end] & 0xc0) == 0x80) --end;  // no part of a UTF-8 character
  std::memcpy(c.text, text.data(), end);
  c.text[end] = '\0';
  exchange_seq_cst(c.failed, uint32_t{2});  // before anything the caller does to its tensors after the error
  if (on_failure_) on_failure_(error);
  return error;
}

std::exception_ptr Watch::fail(const std::exception_ptr& thrown, const std::string& doing) const {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& e) {
    return std::make_exception_ptr(fail(e));
  } catch (...) {  // what a signal's handler threw, or no memory
    const std::string why = "pycoll: " + a_.names.rank(a_.rank) + " was interrupted " + doing;
    (void)fail(Error(ErrorKind::kError, why, a_.rank));
    return thrown;
  }
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
  for (auto nap = kFirstSleep; !awaited.here(); nap = std::min(nap * 2, kLongestSleep)) {
    watch_.waits_for(awaited.peer);
    fetch_add_seq_cst(sleepers, uint32_t{1});
    const uint64_t seen = load_seq_cst(awaited.cell->value);
    if (seen < awaited.value) futex_wait(awaited.cell->value, static_cast<uint32_t>(seen), nap);
    fetch_add_seq_cst(sleepers, ~uint32_t{0});
    if (awaited.here()) break;
    watch_.look(missing, deadline_, timeout_);
    if (interruptible_) check_interrupt();
  }
  watch_.waits_for(Watch::kNobody);
}

void wake(Cell& cell) { futex_wake_all(cell.value); }

}  // namespace pycoll::cpu
