#include "cpu/mail_office.h"

#include <algorithm>
#include <string>

#include "core/atomic.h"

namespace pycoll::cpu {

namespace {

// Of a receive from any source that which sends, once that is known.
int peer_of(const Letter& letter) { return letter.source >= 0 ? letter.source : letter.message.peer; }

std::exception_ptr as_failure(const Error& error) { return std::make_exception_ptr(error); }

}  // namespace

// A waiter, from before it looks at what is shared until after: close() waits for it.
class PostOffice::Visit {
 public:
  explicit Visit(PostOffice& office) : office_(office) { office_.waiters_.fetch_add(1); }
  ~Visit() {
    if (told_) office_.watch_.mail_waits_for(Watch::kNobody);
    office_.waiters_.fetch_sub(1);  // the last that this thread has to do with the office
  }
  Visit(const Visit&) = delete;
  void tell(int peer) {
    office_.watch_.mail_waits_for(peer == kAnySource ? Watch::kAnybody : peer);
    told_ = true;
  }

 private:
  PostOffice& office_;
  bool told_ = false;
};

PostOffice::Lock::Lock(PostOffice& office) : held(office.mutex_, std::defer_lock) {
  office.wanting_.fetch_add(1, std::memory_order_relaxed);
  held.lock();
  office.wanting_.fetch_sub(1, std::memory_order_relaxed);
}

PostOffice::Lock::Lock(PostOffice& office, std::try_to_lock_t) : held(office.mutex_, std::defer_lock) {
  if (office.wanting_.load(std::memory_order_relaxed) == 0) (void)held.try_lock();
}

PostOffice::PostOffice(const Attachment& attachment, const Watch& watch, int spins, const Queue& calls)
    : a_(attachment),
      watch_(watch),
      table_(attachment.table()),
      rank_(attachment.rank),
      world_(attachment.geometry.world),
      spins_(spins),
      calls_(calls),
      bell_(attachment.control(rank_).doorbell),
      lanes_(world_),
      matching_(world_),
      books_(attachment.control(rank_).journals[kMessages]) {}

PostOffice::~PostOffice() {
  if (postman_.joinable()) postman_.detach();  // in a forked child: it is the parent's
}

void PostOffice::check_fork() const {
  if (generation_ == fork_generation()) return;
  throw Error(ErrorKind::kError,
              "pycoll: this communicator belongs to the parent process: after fork, create a new one in the child");
}

void PostOffice::check(const Message& m, bool outgoing) const {
  check_fork();
  const std::string what = outgoing ? "pycoll: send: " : "pycoll: receive: ";
  if (m.peer == rank_) throw Error(ErrorKind::kUsage, what + "a rank cannot exchange messages with itself");
  const bool any = !outgoing && m.peer == kAnySource && world_ > 1;
  if (!any && (m.peer < 0 || m.peer >= world_)) {
    throw Error(ErrorKind::kUsage,
                what + "there is no other rank " + std::to_string(m.peer) + " in a world of " + std::to_string(world_));
  }
  if (m.tag < 0) throw Error(ErrorKind::kUsage, what + "tag " + std::to_string(m.tag) + " is negative");
}

std::string PostOffice::describe(const Letter& letter) const {
  const Message& m = letter.message;
  const std::string who = m.peer == kAnySource ? "any rank" : a_.names.rank(m.peer);
  return std::string(letter.outgoing ? "in send(to " : "in receive(from ") + who + ", tag " + std::to_string(m.tag) +
         ")";
}

PostOffice::Lanes& PostOffice::lanes(int peer) {
  if (!lanes_[peer]) {
    const Pair pair{rank_,
                    peer,
                    a_.names,
                    table_.mailbox(peer, rank_),
                    table_.mailbox(rank_, peer),
                    a_.control(peer).doorbell,
                    table_.geometry.mail_bytes};
    lanes_[peer] = std::make_unique<Lanes>(pair, matching_);
  }
  return *lanes_[peer];
}

Request PostOffice::start(const Message& message, bool outgoing, Mail::Done done) {
  check(message, outgoing);
  const auto letter = std::make_shared<Letter>(message, outgoing, std::move(done), shared_from_this());
  Mail::Done at_once;
  {
    const Lock lock(*this);
    if (closing_ || calls_.refuses()) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
    watch_.throw_if_failed();
    if (outgoing && load_acquire(a_.control(message.peer).departed) != 0) {
      throw watch_.fail(watch_.lost(message.peer, Watch::Fate::kLeft));
    }
    begin(letter);
    const Step made = step();
    // Only sleepers that know of what a GPU does look at it often enough.
    if (made.awaits_gpu && load_seq_cst(bell_.sleepers) != 0) ring(bell_);
    if (letter->ended) {
      at_once = std::exchange(letter->done, nullptr);
      std::erase(books_.finished, letter);
    } else if (letter->asynchronous) {
      call_the_postman();
    }
  }
  if (at_once) at_once(letter->failure);
  return Request(letter);
}

void PostOffice::begin(const LetterPtr& letter) {
  const int peer = letter->message.peer;
  if (peer != kAnySource) (void)lanes(peer);
  for (int p = 0; peer == kAnySource && p < world_; ++p) {
    if (p != rank_) (void)lanes(p);
  }
  if (letter->outgoing) {
    lanes(peer).out.add(letter);
    books_.begin(letter);
    return;
  }
  const std::optional<Announced> aside = matching_.begin(letter);
  books_.begin(letter);
  if (!aside) return;
  Step found{books_};
  try {
    lanes(aside->source).in.meet(letter, *aside, found);
  } catch (...) {
    fail(std::current_exception());
  }
}

void PostOffice::call_the_postman() {
  try {
    if (!postman_.joinable()) {
      const SignalsBlocked no_signals;
      postman_ = std::thread(&PostOffice::deliver, this);
    }
    if (!lingers_) parked_.notify_one();
  } catch (const std::exception& e) {
    fail(as_failure(Error(ErrorKind::kError, std::string("pycoll: no thread for messages: ") + e.what(), rank_)));
  }
}

// ---- steps ----

Step PostOffice::step(uint32_t own_sleepers) {
  Step made{books_};
  if (gone_) return made;
  if (!verdict_ && watch_.failed(rank_)) fail(nullptr);
  if (verdict_) {
    give_up(made);
  } else {
    try {
      const int first = first_;
      for (int i = 0; i < world_; ++i) advance((first + i) % world_, made);
    } catch (...) {
      fail(std::current_exception());
      made.moved = true;
    }
  }
  // Somebody of this rank may sleep on what this step has done.
  if (made.moved && load_seq_cst(bell_.sleepers) > own_sleepers) ring(bell_);
  return made;
}

void PostOffice::advance(int peer, Step& step) {
  Lanes* const l = lanes_[peer].get();
  if (l == nullptr) return;
  if (l->out.busy()) l->out.advance(step);
  if (!l->in.busy()) return;
  l->in.advance(step);
  if (l->in.answered_any()) first_ = (peer + 1) % world_;
}

// Tells the others, unless they know. What ends this rank's requests is its first failure, be it this one or not.
void PostOffice::fail(const std::exception_ptr& failure) {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const Error& e) {
    (void)watch_.fail(e);
  } catch (const std::exception& e) {
    const std::string why = "pycoll: a message of " + a_.names.rank(rank_) + " failed: " + e.what();
    (void)watch_.fail(Error(ErrorKind::kError, why, rank_));
  }
  try {
    watch_.throw_if_failed();
  } catch (...) {
    verdict_ = std::current_exception();
  }
}

// Ends all requests; those whose chunks a GPU still moves when it has done so (M10).
void PostOffice::give_up(Step& step) {
  if (books_.open == 0) return;
  if (!verdict_since_) verdict_since_ = Clock::now();
  const bool at_once = Clock::now() - *verdict_since_ > watch_.timeout();
  const size_t open = books_.open;
  for (const LetterPtr& letter : matching_.take_all(kAnySource)) books_.end(letter, verdict_);
  for (const auto& l : lanes_) {
    if (!l) continue;
    l->out.give_up(books_, verdict_, at_once);
    l->in.give_up(books_, verdict_, at_once);
  }
  step.moved = books_.open != open;
  step.moving = step.awaits_gpu = books_.open > 0;
}

// ---- who waits ----

bool PostOffice::ended(Letter& letter) {
  if (letter.ended) return true;
  check_fork();
  const Lock lock(*this, std::try_to_lock);
  if (lock.held) (void)step();
  return letter.ended;
}

void PostOffice::await(Letter& letter, std::optional<std::chrono::milliseconds> timeout, Visit& visit,
                       std::exception_ptr& interrupted) {
  const auto longest = watch_.timeout();
  const bool shorter = timeout && *timeout < longest;
  const auto deadline = Clock::now() + (shorter ? *timeout : longest);
  const auto look = [&] {
    {
      const Lock lock(*this);
      visit.tell(peer_of(letter));
      look_for_losses();
    }
    let_interrupts_in(letter, interrupted);
    if (Clock::now() >= deadline) overdue(letter, shorter ? timeout : std::nullopt);
  };
  drive([&] { return letter.ended.load(); }, look, deadline);
}

void PostOffice::wait(Letter& letter, std::optional<std::chrono::milliseconds> timeout) {
  std::exception_ptr interrupted;
  if (!letter.ended) {
    check_fork();
    Visit visit(*this);
    if (!gone_) await(letter, timeout, visit, interrupted);
  }
  if (letter.asynchronous && generation_ == fork_generation()) {
    Mail::Done done;
    {
      const Lock lock(*this);
      done = std::exchange(letter.done, nullptr);  // the postman may have called it, or calls it now
    }
    if (done) done(letter.failure);
  }
  if (interrupted) std::rethrow_exception(interrupted);
  if (letter.failure) std::rethrow_exception(letter.failure);
}

// What a signal's handler throws ends the wait for an asynchronous request, and a request whose memory is the caller's,
// with the communicator.
void PostOffice::let_interrupts_in(const Letter& letter, std::exception_ptr& interrupted) {
  if (interrupted) return;
  const Queue::Inside inside(&calls_);  // handlers make no collectives, and do not wait here for this very thread to go
  try {
    check_interrupt();
  } catch (...) {
    if (letter.asynchronous) throw;
    interrupted = watch_.fail(std::current_exception(), describe(letter));
  }
}

// `given`: to this wait alone, less than the communicator's time-out.
void PostOffice::overdue(const Letter& letter, std::optional<std::chrono::milliseconds> given) {
  const Lock lock(*this);
  (void)step();
  if (letter.ended || verdict_) return;
  const int peer = peer_of(letter);
  if (!given) return fail(as_failure(watch_.late(peer, watch_.timeout(), " " + describe(letter))));
  throw Error(ErrorKind::kTimeout,
              "pycoll: " + a_.names.rank(rank_) + " waited " + describe(letter) + " for the " +
                  std::to_string(given->count()) + " ms given to wait(); it goes on",
              peer);
}

}  // namespace pycoll::cpu
