// A pretended GPU that moves memory when it has come to it.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "cpu/elsewhere.h"

struct FakeCopy {
  void* dst;
  const void* src;
  size_t bytes;
  void make() const { std::memcpy(dst, src, bytes); }
};

// It is done when it has been asked often enough: so often before the first copy, and then a few times for each batch.
class FakeMover : public pycoll::cpu::Mover {
 public:
  explicit FakeMover(int busy) : busy_(busy) {}

  void combine(pycoll::DType, pycoll::ReduceOp, const pycoll::CombineArgs&) override {}
  void copy(void* dst, const void* src, size_t bytes) override {
    copies_.push_back({dst, src, bytes});
    busy_ = std::max(busy_.load(), 2);
  }
  bool done() override {
    if (busy_ > 0) {
      --busy_;
      return false;
    }
    for (const FakeCopy& c : copies_) c.make();
    copies_.clear();
    return true;
  }
  void come() { busy_ = 0; }  // from any thread

 private:
  std::atomic<int> busy_;
  std::deque<FakeCopy> copies_;
};

// A thread of its own moves the memory, a while after it was asked.
class SlowMover : public pycoll::cpu::Mover {
 public:
  explicit SlowMover(std::chrono::microseconds delay) : delay_(delay), thread_([this] { work(); }) {}
  ~SlowMover() override {
    {
      const std::lock_guard guard(lock_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void combine(pycoll::DType, pycoll::ReduceOp, const pycoll::CombineArgs&) override {}
  void copy(void* dst, const void* src, size_t bytes) override {
    const std::lock_guard guard(lock_);
    copies_.push_back({dst, src, bytes});
    changed_.notify_all();
  }
  bool done() override {
    const std::lock_guard guard(lock_);
    return copies_.empty();
  }

 private:
  void work() {
    std::unique_lock guard(lock_);
    for (;;) {
      changed_.wait(guard, [&] { return ending_ || !copies_.empty(); });
      if (copies_.empty()) return;
      const FakeCopy next = copies_.front();
      guard.unlock();
      std::this_thread::sleep_for(delay_);
      next.make();
      guard.lock();
      copies_.pop_front();
    }
  }

  const std::chrono::microseconds delay_;
  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<FakeCopy> copies_;
  bool ending_ = false;
  std::thread thread_;
};
