// The post office of a rank: its lanes, its requests, who makes the steps that move them, and how it all ends
// (csrc/README.md, M6 and M8 to M11).
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "core/atomic.h"
#include "core/layout.h"
#include "cpu/mail_inbox.h"
#include "cpu/mail_outbox.h"
#include "cpu/mail_pace.h"
#include "cpu/queue.h"
#include "cpu/wait.h"

namespace pycoll::cpu {

class PostOffice : public std::enable_shared_from_this<PostOffice> {
 public:
  // What it refers to lives until close() has returned. `calls`: the collectives of the communicator.
  PostOffice(const Attachment& attachment, const Watch& watch, int spins, const Queue& calls);
  ~PostOffice();

  Request start(const Message& message, bool outgoing, Mail::Done done);
  bool ended(Letter& letter);
  void wait(Letter& letter, std::optional<std::chrono::milliseconds> timeout);

  // M11. `interrupt` is called about every 20 ms; it must not throw.
  void close(const std::function<void()>& interrupt);
  size_t footprint();  // bytes: mailboxes as far as they have been used, and messages that lie aside

 private:
  struct Lanes {  // to and from one peer
    Lanes(const Pair& pair, Matching& matching) : out(pair), in(pair, matching) {}
    Outbox out;
    Inbox in;
  };
  // Whoever holds it makes steps. Those who only try leave it to those who need it.
  class Lock {
   public:
    explicit Lock(PostOffice& office);
    Lock(PostOffice& office, std::try_to_lock_t);
    std::unique_lock<std::mutex> held;
  };
  class Visit;  // of a waiter
  struct Turn {
    bool over, moved;
  };

  void check(const Message& message, bool outgoing) const;
  std::string describe(const Letter& letter) const;
  void check_fork() const;
  Lanes& lanes(int peer);

  // Under the lock.
  void begin(const LetterPtr& letter);
  void call_the_postman();
  Step step(uint32_t own_sleepers = 0);
  void advance(int peer, Step& step);
  void give_up(Step& step);
  void fail(const std::exception_ptr& failure);
  void look_for_losses();
  bool exhaust(int peer);
  bool in_vain(int peer, Watch::Fate fate, bool all_gone) const;
  void lose(int peer, Watch::Fate fate);
  bool no_sends_are_left();

  template <class Over, class Look>
  void drive(const Over& over, const Look& look, Clock::time_point limit = Clock::time_point::max());
  template <class Over>
  Turn turn(const Over& over);
  template <class Over>
  Turn sleep(const Over& over, std::chrono::microseconds nap);
  void await(Letter& letter, std::optional<std::chrono::milliseconds> timeout, Visit& visit,
             std::exception_ptr& interrupted);
  void let_interrupts_in(const Letter& letter, std::exception_ptr& interrupted);
  void overdue(const Letter& letter, std::optional<std::chrono::milliseconds> given);

  void leave(const std::function<void()>& interrupt);
  void deliver();  // the postman
  void park(std::unique_lock<std::mutex>& held);
  void call_done(std::unique_lock<std::mutex>& held);

  const Attachment& a_;
  const Watch& watch_;
  const PeerTable table_;
  const int rank_, world_, spins_;
  const Queue& calls_;  // once closed, no more than an address
  const uint64_t generation_ = fork_generation();
  Doorbell& bell_;

  std::mutex mutex_;
  std::atomic<int> wanting_{0};  // threads that need the lock
  std::vector<std::unique_ptr<Lanes>> lanes_;
  Matching matching_;
  Books books_;
  int first_ = 0;               // a step begins with its lanes
  std::exception_ptr verdict_;  // why all requests end: it failed, or it is closed
  std::optional<Clock::time_point> verdict_since_;
  bool closing_ = false;
  bool stopping_ = false;  // all has ended: the postman is to go
  std::thread postman_;
  std::condition_variable parked_;  // the postman, while nothing asynchronous is under way
  bool lingers_ = false;            // it looks around by itself

  std::atomic<int> waiters_{0};    // threads in wait()
  std::atomic<bool> gone_{false};  // closed: nothing that is shared may be touched any more
};

// Makes steps until `over`, which is asked under the lock; calls `look` about every 20 ms, and at the limit.
template <class Over, class Look>
void PostOffice::drive(const Over& over, const Look& look, Clock::time_point limit) {
  for (Pace pace(spins_, limit);;) {
    const Turn made = pace.sleeps() ? sleep(over, pace.nap()) : turn(over);
    if (made.over) return;
    pace.after(made.moved);
    if (pace.time_to_look()) look();
  }
}

template <class Over>
PostOffice::Turn PostOffice::turn(const Over& over) {
  const Lock lock(*this, std::try_to_lock);
  if (!lock.held) return {false, false};
  const bool moved = step().moved;
  return {over(), moved};
}

// M8.
template <class Over>
PostOffice::Turn PostOffice::sleep(const Over& over, std::chrono::microseconds nap) {
  fetch_add_seq_cst(bell_.sleepers, uint32_t{1});
  const uint64_t heard = load_seq_cst(bell_.rings);
  Turn made{};
  bool awaits_gpu = false;
  {
    const Lock lock(*this);
    const Step last = step(/*own_sleepers=*/1);
    made = {over(), last.moved};
    awaits_gpu = last.awaits_gpu;
  }
  if (!made.over && !made.moved) {
    if (awaits_gpu) {
      std::this_thread::sleep_for(kMovesNap);
    } else {
      futex_wait(bell_.rings, static_cast<uint32_t>(heard), nap);
    }
  }
  fetch_add_seq_cst(bell_.sleepers, ~uint32_t{0});
  return made;
}

}  // namespace pycoll::cpu
