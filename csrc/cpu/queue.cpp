#include "cpu/queue.h"

#include <chrono>
#include <optional>
#include <utility>

#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

namespace {
thread_local const void* innermost = nullptr;  // a Queue::Inside
thread_local void* here = nullptr;             // the Queue::Worker that this thread is
}  // namespace

struct Queue::Worker {
  explicit Worker(Queue& q) : queue(q) { here = this; }
  Queue& queue;
  std::optional<Inside> turn;       // while it is inside a call, or in a `done` that has not handed on
  bool over = false, away = false;  // its call; in a `done` that has
};

Queue::Inside::Inside(const void* q) : queue(q), outer(static_cast<const Inside*>(innermost)) { innermost = this; }
Queue::Inside::~Inside() { innermost = outer; }

bool Queue::inside(const void* queue) {
  for (auto* i = static_cast<const Inside*>(innermost); i != nullptr; i = i->outer) {
    if (i->queue == queue) return true;
  }
  return false;
}

bool Queue::is_worker() const { return here != nullptr && &static_cast<Worker*>(here)->queue == this; }
bool Queue::serves(const Queue* queue) { return inside(queue) || queue->is_worker(); }

bool Queue::begin() {
  const std::lock_guard guard(lock_);
  if (busy_ || !jobs_.empty() || refuses()) return false;
  return busy_ = true;
}

void Queue::end() {
  const std::lock_guard guard(lock_);
  busy_ = false;
  if (!jobs_.empty() || ending_) changed_.notify_all();
}

void Queue::run_queued(std::function<void(bool)> call, const std::function<void()>& interrupt) {
  struct Result {
    std::mutex lock;
    std::condition_variable changed;
    bool done = false;
    std::exception_ptr failure;
  };
  const auto result = std::make_shared<Result>();
  enqueue(std::move(call), [result](std::exception_ptr failure) {
    const std::lock_guard guard(result->lock);
    result->failure = failure;
    result->done = true;
    result->changed.notify_all();
  });
  std::exception_ptr interrupted;
  std::unique_lock guard(result->lock);
  while (!result->changed.wait_for(guard, std::chrono::milliseconds(20), [&] { return result->done; })) {
    if (interrupted) continue;
    guard.unlock();
    try {
      interrupt();
    } catch (...) {
      interrupted = std::current_exception();
    }
    guard.lock();
  }
  if (interrupted) std::rethrow_exception(interrupted);
  if (result->failure) std::rethrow_exception(result->failure);
}

void Queue::enqueue(std::function<void(bool)> call, Done done) {
  const std::lock_guard guard(lock_);
  if (refuses()) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  need_worker();  // first, since it may fail
  jobs_.push_back({std::move(call), std::move(done)});
  changed_.notify_all();
}

void Queue::need_worker() {
  if (running_ > away_) return;
  std::erase_if(workers_, [&](std::thread& worker) {
    if (std::erase(spare_, worker.get_id()) == 0) return false;
    worker.join();  // it has nothing left to do
    return true;
  });
  const SignalsBlocked no_signals;
  workers_.emplace_back(&Queue::work, this);
  ++running_;
}

void Queue::hand_on() {
  auto* me = static_cast<Worker*>(here);
  if (me == nullptr || !me->over || me->away) return;
  Queue& queue = me->queue;
  const std::lock_guard guard(queue.lock_);
  ++queue.away_;
  try {
    if (!queue.jobs_.empty()) queue.need_worker();
  } catch (...) {  // no more threads: then all goes on after `done`
    --queue.away_;
    return;
  }
  me->away = true;
  me->turn.reset();
  queue.busy_ = false;
  queue.changed_.notify_all();
}

void Queue::work() {
  Worker me(*this);
  std::unique_lock guard(lock_);
  for (;;) {
    changed_.wait(guard, [&] { return !busy_ && (!jobs_.empty() || ending_); });
    if (jobs_.empty()) break;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    guard.unlock();
    me.turn.emplace(this);
    std::exception_ptr failure;
    try {
      job.call(false);
    } catch (...) {
      failure = std::current_exception();
    }
    job.call = {};  // what the call kept alive goes before the next call starts
    me.over = true;
    job.done(failure);
    job = {};
    me.turn.reset();
    guard.lock();
    me.over = false;
    if (!std::exchange(me.away, false)) {
      busy_ = false;
      changed_.notify_all();
    } else if (--away_; jobs_.empty() && running_ - away_ > 1) {  // another one is there for what comes
      spare_.push_back(std::this_thread::get_id());
      break;
    }
  }
  --running_;
  changed_.notify_all();
}

void Queue::stop(const std::function<void()>& interrupt) {
  {
    std::unique_lock guard(lock_);
    ending_ = true;
    changed_.notify_all();
    // The workers, or a call of another thread.
    while (!changed_.wait_for(guard, std::chrono::milliseconds(20), [&] { return !busy_ && running_ == 0; })) {
      guard.unlock();
      interrupt();
      guard.lock();
    }
  }
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

}  // namespace pycoll::cpu
