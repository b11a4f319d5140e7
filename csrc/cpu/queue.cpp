#include "cpu/queue.h"

#include <chrono>

#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

bool Queue::begin() {
  const std::lock_guard guard(lock_);
  if (busy_ || !jobs_.empty() || ending_) return false;
  holder_ = std::this_thread::get_id();
  return busy_ = true;
}

void Queue::end() {
  const std::lock_guard guard(lock_);
  busy_ = false;
  holder_ = std::thread::id{};
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
  jobs_.push_back({std::move(call), std::move(done)});
  if (!worker_.joinable()) {
    const SignalsBlocked no_signals;
    worker_ = std::thread(&Queue::work, this);
  }
  changed_.notify_all();
}

void Queue::work() {
  std::unique_lock guard(lock_);
  for (;;) {
    changed_.wait(guard, [&] { return !busy_ && (!jobs_.empty() || ending_); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    holder_ = std::this_thread::get_id();
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
    holder_ = std::thread::id{};
    changed_.notify_all();
  }
}

void Queue::stop() {
  {
    std::unique_lock guard(lock_);
    ending_ = true;
    changed_.notify_all();
    if (!worker_.joinable()) changed_.wait(guard, [&] { return !busy_; });  // a call of another thread
  }
  if (worker_.joinable()) worker_.join();
}

}  // namespace pycoll::cpu
