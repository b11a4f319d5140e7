#include "cpu/queue.h"

#include <chrono>

#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

namespace {
thread_local const void* innermost = nullptr;  // a Queue::Inside
}

Queue::Inside::Inside(const void* q) : queue(q), outer(static_cast<const Inside*>(innermost)) { innermost = this; }
Queue::Inside::~Inside() { innermost = outer; }

bool Queue::inside(const void* queue) {
  for (auto* i = static_cast<const Inside*>(innermost); i != nullptr; i = i->outer) {
    if (i->queue == queue) return true;
  }
  return false;
}

bool Queue::begin() {
  const std::lock_guard guard(lock_);
  if (busy_ || !jobs_.empty() || ending_) return false;
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
  if (ending_) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  if (!working_) {  // first, since it may fail
    const SignalsBlocked no_signals;
    worker_ = std::thread(&Queue::work, this);
    working_ = true;
  }
  jobs_.push_back({std::move(call), std::move(done)});
  changed_.notify_all();
}

void Queue::work() {
  const Inside inside(this);
  std::unique_lock guard(lock_);
  for (;;) {
    changed_.wait(guard, [&] { return !busy_ && (!jobs_.empty() || ending_); });
    if (jobs_.empty()) break;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    guard.unlock();
    std::exception_ptr failure;
    try {
      job.call(false);
    } catch (...) {
      failure = std::current_exception();
    }
    job.done(failure);
    job = {};  // what the call kept alive goes before the next call starts
    guard.lock();
    busy_ = false;
    changed_.notify_all();
  }
  working_ = false;
  changed_.notify_all();
}

void Queue::stop(const std::function<void()>& interrupt) {
  {
    std::unique_lock guard(lock_);
    ending_ = true;
    changed_.notify_all();
    // The worker, or a call of another thread.
    while (!changed_.wait_for(guard, std::chrono::milliseconds(20), [&] { return !busy_ && !working_; })) {
      guard.unlock();
      interrupt();
      guard.lock();
    }
  }
  if (worker_.joinable()) worker_.join();
}

}  // namespace pycoll::cpu
