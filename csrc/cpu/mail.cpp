// The postman, who is waited for in vain, and the end.
#include "cpu/mail.h"

#include <algorithm>

#include "core/atomic.h"
#include "cpu/mail_office.h"
#include "cpu/queue.h"

namespace pycoll::cpu {

namespace {
constexpr auto kBesideOthers = std::chrono::milliseconds(1);  // between steps of the postman while somebody waits
constexpr int kLingering = 50;                                // of them, before it parks until it is called
}  // namespace

bool Request::ended() const { return letter_->office->ended(*letter_); }
void Request::wait(std::optional<std::chrono::milliseconds> timeout) const { letter_->office->wait(*letter_, timeout); }
int Request::source() const { return letter_->source; }

Request Mail::send(const Message& message, Done done) {
  return office_->start(message, /*outgoing=*/true, std::move(done));
}
Request Mail::receive(const Message& message, Done done) {
  return office_->start(message, /*outgoing=*/false, std::move(done));
}

// ---- the postman ----

void PostOffice::deliver() {
  const Queue::Inside inside(&calls_);
  std::unique_lock held(mutex_);
  for (;;) {
    park(held);
    call_done(held);
    if (stopping_) return;
    if (books_.asynchronous == 0) continue;
    if (waiters_ > 0) {
      (void)step();
      if (books_.finished.empty()) parked_.wait_for(held, kBesideOthers, [&] { return stopping_; });
      continue;
    }
    held.unlock();
    const auto over = [&] { return stopping_ || books_.asynchronous == 0 || !books_.finished.empty() || waiters_ > 0; };
    drive(over, [&] {
      const Lock lock(*this);
      look_for_losses();
    });
    held.lock();
  }
}

// Until there is something to do. Who starts something asynchronous mostly waits for it at once, and again and again: so
// the postman looks around by itself for a while, a millisecond late at worst, and need not be called each time.
void PostOffice::park(std::unique_lock<std::mutex>& held) {
  const auto called = [&] { return stopping_ || !books_.finished.empty(); };
  const auto due = [&] { return called() || books_.asynchronous > 0; };
  lingers_ = true;
  for (int i = 0; i < kLingering && !due(); ++i) parked_.wait_for(held, kBesideOthers, called);
  lingers_ = false;
  parked_.wait(held, due);
}

void PostOffice::call_done(std::unique_lock<std::mutex>& held) {
  while (!books_.finished.empty()) {
    LetterPtr letter = std::move(books_.finished.front());
    books_.finished.erase(books_.finished.begin());
    Mail::Done done = std::exchange(letter->done, nullptr);
    if (!done) continue;
    held.unlock();
    done(letter->failure);
    done = nullptr;  // what it kept alive goes now
    letter = nullptr;
    held.lock();
  }
}

// ---- who is waited for in vain ----

// The news first, the lanes after it: what a rank did before it died, failed or left still counts (M9).
void PostOffice::look_for_losses() {
  const size_t open = books_.open;
  if (verdict_ || open == 0) return;
  std::vector<std::pair<int, Watch::Fate>> gone;
  int failed = -1;
  for (int r = 0; r < world_; ++r) {
    if (r == rank_) continue;
    const Watch::Fate fate = lanes_[r] ? watch_.fate(r) : Watch::Fate::kHere;
    if (fate != Watch::Fate::kHere) gone.emplace_back(r, fate);
    if (watch_.failed(r)) failed = r;  // who has failed and left then is to be blamed for that
  }
  if (failed >= 0 && exhaust(failed) && books_.open > 0 && !verdict_) {
    try {
      watch_.throw_failure_of(failed);
    } catch (...) {
      fail(std::current_exception());
    }
  }
  // Whether all are gone is part of the news: the last may have sent something since.
  bool all_gone = static_cast<int>(gone.size()) == world_ - 1;
  for (auto& [peer, fate] : gone) {
    if (failed >= 0 || verdict_ || exhaust(peer)) continue;
    all_gone = false;
    fate = Watch::Fate::kHere;  // for now
  }
  // Who has died is to be blamed before who has left.
  std::stable_partition(gone.begin(), gone.end(), [](const auto& g) { return g.second == Watch::Fate::kDead; });
  for (const auto& [peer, fate] : gone) {
    if (failed < 0 && !verdict_ && in_vain(peer, fate, all_gone)) lose(peer, fate);
  }
  if ((verdict_ || books_.open != open) && load_seq_cst(bell_.sleepers) != 0)
    ring(bell_);  // it concerns this rank's own
}

// Takes what a rank has left here, which is not much. False: a GPU still moves some of it, ask again.
bool PostOffice::exhaust(int peer) {
  try {
    for (;;) {
      Step made{books_};
      advance(peer, made);
      if (!made.moved) return !made.moving;
    }
  } catch (...) {
    fail(std::current_exception());
    return false;
  }
}

bool PostOffice::in_vain(int peer, Watch::Fate fate, bool all_gone) const {
  if (fate == Watch::Fate::kHere) return false;
  const Lanes& l = *lanes_[peer];
  if (l.out.busy() || l.in.needs_peer() || matching_.wanted_by_name(peer)) return true;
  return matching_.from_any() && (fate == Watch::Fate::kDead || all_gone);
}

// Ends the communicator. One that is being closed goes on with its messages to others.
void PostOffice::lose(int peer, Watch::Fate fate) {
  const auto failure = std::make_exception_ptr(watch_.lost(peer, fate));
  if (!closing_) return fail(failure);
  for (const LetterPtr& letter : matching_.take_all(peer)) books_.end(letter, failure);
  lanes_[peer]->out.give_up(books_, failure, /*at_once=*/false);
  lanes_[peer]->in.give_up(books_, failure, /*at_once=*/false);
}

// ---- the end (M11) ----

void PostOffice::close(const std::function<void()>& interrupt) {
  {
    const Lock lock(*this);
    if (gone_) return;
    closing_ = true;
    exchange_seq_cst(a_.control(rank_).closing, uint32_t{1});
  }
  const auto end = [&] {
    const Lock lock(*this);
    if (!verdict_) verdict_ = std::make_exception_ptr(Error(ErrorKind::kError, "pycoll: the communicator is closed"));
  };
  const auto deadline = Clock::now() + watch_.timeout();
  drive([&] { return no_sends_are_left(); },
        [&] {
          interrupt();
          {
            const Lock lock(*this);
            look_for_losses();
          }
          if (Clock::now() >= deadline) end();
        },
        deadline);
  end();
  drive([&] { return books_.open == 0; }, interrupt);
  {
    const Lock lock(*this);
    stopping_ = true;
    parked_.notify_one();
    ring(bell_);
  }
  if (postman_.joinable()) postman_.join();
  leave(interrupt);
}

// The last waiters have nothing to wait for: their requests have ended.
void PostOffice::leave(const std::function<void()>& interrupt) {
  {
    const Lock lock(*this);
    gone_ = true;
  }
  for (auto next = Clock::now() + kLongestSleep; waiters_ > 0; std::this_thread::sleep_for(kMovesNap)) {
    ring(bell_);
    if (Clock::now() < next) continue;
    interrupt();
    next = Clock::now() + kLongestSleep;
  }
}

// Ends what goes to ranks that take nothing any more.
bool PostOffice::no_sends_are_left() {
  if (verdict_) return true;
  Step made{books_};
  bool none = true;
  for (int p = 0; p < world_; ++p) {
    if (!lanes_[p] || !lanes_[p]->out.busy()) continue;
    const Control& peer = a_.control(p);
    if (load_acquire(peer.closing) != 0 || load_acquire(peer.departed) != 0) {
      const auto lost = std::make_exception_ptr(watch_.lost(p, Watch::Fate::kLeft));
      try {
        lanes_[p]->out.lose_what_is_not_granted(made, lost);
      } catch (...) {
        fail(std::current_exception());
        return true;
      }
    }
    none &= !lanes_[p]->out.busy();
  }
  return none;
}

size_t PostOffice::footprint() {
  const Lock lock(*this);
  if (gone_) return 0;
  const Geometry& g = table_.geometry;
  return resident_bytes(table_.base[rank_] + g.mail_offset(), world_ * g.mailbox_bytes()) + matching_.bytes_aside();
}

}  // namespace pycoll::cpu
