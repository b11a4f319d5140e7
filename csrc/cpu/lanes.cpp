#include "cpu/lanes.h"

#include <chrono>
#include <utility>

#include "cpu/os.h"

namespace pycoll::cpu {

void Lanes::start(int count, std::function<void(int)> job) {
  {
    const std::lock_guard guard(lock_);
    const SignalsBlocked no_signals;
    while (static_cast<int>(threads_.size()) < count - 1) {
      threads_.emplace_back(&Lanes::work, this, static_cast<int>(threads_.size()) + 1, jobs_);
    }
    job_ = std::move(job);
    count_ = count;
    running_ = count - 1;
    failure_ = nullptr;
    ++jobs_;
  }
  changed_.notify_all();
}

std::exception_ptr Lanes::join(const std::function<void()>& meanwhile) {
  std::unique_lock guard(lock_);
  while (!changed_.wait_for(guard, std::chrono::milliseconds(20), [&] { return running_ == 0; })) {
    guard.unlock();
    meanwhile();
    guard.lock();
  }
  return std::exchange(failure_, nullptr);
}

void Lanes::stop() {
  {
    const std::lock_guard guard(lock_);
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& t : threads_) t.join();
  threads_.clear();
}

void Lanes::work(int channel, uint64_t seen) {
  std::unique_lock guard(lock_);
  for (;;) {
    changed_.wait(guard, [&] { return ending_ || jobs_ != seen; });
    if (ending_) return;
    seen = jobs_;
    if (channel >= count_) continue;
    guard.unlock();
    std::exception_ptr failure;
    try {
      job_(channel);
    } catch (...) {
      failure = std::current_exception();
    }
    guard.lock();
    if (failure && !failure_) failure_ = failure;
    if (--running_ == 0) changed_.notify_all();
  }
}

}  // namespace pycoll::cpu
