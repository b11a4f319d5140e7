// How who waits for mail goes about it: it spins, then yields its core for at most 200 us, then sleeps; and anew after each
// step that has moved something.
#pragma once

#include <sched.h>

#include <algorithm>

#include "cpu/wait.h"

namespace pycoll::cpu {

class Pace {
 public:
  // `limit`: when to look at the latest.
  Pace(int spins, Clock::time_point limit) : spins_(spins), limit_(limit) {}

  bool sleeps() const { return mode_ == Mode::kSleep; }
  std::chrono::microseconds nap() const {
    const auto left = std::chrono::duration_cast<std::chrono::microseconds>(limit_ - Clock::now());
    return std::clamp(left, std::chrono::microseconds(1), nap_);
  }

  void after(bool moved) {
    if (moved) {
      mode_ = Mode::kSpin;
      spun_ = 0;
      nap_ = kFirstSleep;
    }
    if (mode_ == Mode::kSpin) {
      relax();
      if (++spun_ < spins_) return;
      mode_ = Mode::kYield;
      began_ = before_ = Clock::now();
    } else if (mode_ == Mode::kYield) {
      sched_yield();
      const auto now = Clock::now();
      if (now - before_ > kLongTurn || now - began_ > kYielding) mode_ = Mode::kSleep;
      before_ = now;
    } else {
      nap_ = std::min(nap_ * 2, kLongestSleep);
    }
  }

  bool time_to_look() {
    if (mode_ == Mode::kSpin && ++spins_since_ % 256 != 0) return false;
    const auto now = Clock::now();
    if (next_look_ == Clock::time_point{}) next_look_ = now + kFirstSleep;
    if (now < next_look_ && now < limit_) return false;
    next_look_ = now + kLongestSleep;
    return true;
  }

 private:
  enum class Mode { kSpin, kYield, kSleep };

  const int spins_;
  const Clock::time_point limit_;
  Mode mode_ = Mode::kSpin;
  int spun_ = 0;
  unsigned spins_since_ = 0;
  Clock::time_point began_, before_, next_look_{};
  std::chrono::microseconds nap_ = kFirstSleep;
};

}  // namespace pycoll::cpu
