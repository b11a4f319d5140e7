// Sleep and wake-up on a cell (csrc/README.md, C3; cpu/wait.h and wait.cpp: post, sleep_until_here).
//
// A nap has no end here, so a lost wake-up is a deadlock. What C++ and processors may do to an access that is not
// sequentially consistent is a store that others see later, at any moment until the thread enters the kernel.
#include <array>

#include "report.h"

using namespace model;

namespace {

struct Mutation {
  bool late_post = false;              // a release store instead of an exchange
  bool late_add = false;               // the same of the sleeper's entry in `sleepers`
  bool look_first = false;             // the poster looks at `sleepers`, then posts
  bool add_after_look = false;         // the sleeper looks at the value, then adds itself
  bool sleep_unconditionally = false;  // no comparison in the kernel
};

class CellSleep {
 public:
  enum Pc : uint8_t { kNext, kLookAtSleepers, kPostLate, kAdd, kRead, kWait, kAsleep, kLeave, kEnd };
  static constexpr int kSleepers = 2, kPosts = 2;
  struct Sleeper {
    uint8_t pc, target, seen, late;
  };
  struct State {
    uint8_t value, sleepers;
    uint8_t poster, posted, rings, late;  // its pc; how many posts; whether it will wake; its store is not seen yet
    std::array<Sleeper, kSleepers> sleeper;
  };

  explicit CellSleep(Mutation m = {}) : m_(m) {}

  State initial() const {
    State s{};
    for (Sleeper& w : s.sleeper) w.target = 1;
    return s;
  }
  const char* wrong(const State&) const { return nullptr; }
  bool finished(const State& s) const {
    for (const Sleeper& w : s.sleeper) {
      if (w.pc != kEnd) return false;
    }
    return s.poster == kEnd;
  }

  template <class Emit>
  void moves(const State& s, const Emit& emit) const {
    if (s.late) {
      State next = s;
      next.late = 0;
      next.value = s.posted;
      emit(next, 0, "its post is seen");
    }
    post(s, emit);
    for (int i = 0; i < kSleepers; ++i) {
      if (s.sleeper[i].late) {
        State next = s;
        next.sleeper[i].late = 0;
        ++next.sleepers;
        emit(next, i + 1, "its entry is seen");
      }
      sleep(s, i, emit);
    }
  }

 private:
  // post(): exchange, then look at the sleepers.
  template <class Emit>
  void post(const State& s, const Emit& emit) const {
    State next = s;
    switch (s.poster) {
      case kNext:
        if (s.posted == kPosts) {
          next.poster = kEnd;
          return emit(next, 0, "ends");
        }
        if (s.late) return;  // stores of one thread are seen in order
        ++next.posted;
        next.poster = kLookAtSleepers;
        if (m_.look_first) {
          next.rings = s.sleepers != 0;
          next.poster = kPostLate;
          return emit(next, 0, "looks at sleepers");
        }
        if (m_.late_post) {
          next.late = 1;
        } else {
          next.value = next.posted;
        }
        return emit(next, 0, "posts");
      case kPostLate:
        next.value = s.posted;
        next.poster = kLookAtSleepers;
        return emit(next, 0, "posts");
      case kLookAtSleepers: {
        const bool rings = m_.look_first ? s.rings != 0 : s.sleepers != 0;
        if (rings && s.late) return;  // the kernel is entered with all stores seen
        for (Sleeper& w : next.sleeper) {
          if (rings && w.pc == kAsleep) w.pc = kLeave;
        }
        next.rings = 0;
        next.poster = kNext;
        return emit(next, 0, rings ? "wakes the sleepers" : "sees no sleeper");
      }
      default:
        return;
    }
  }

  // sleep_until_here(): add, look again, sleep while the value is what was seen, subtract.
  template <class Emit>
  void sleep(const State& s, int i, const Emit& emit) const {
    State next = s;
    Sleeper& me = next.sleeper[i];
    const int who = i + 1;
    switch (me.pc) {
      case kNext:
        if (s.value >= me.target) {
          me.pc = me.target == kPosts ? kEnd : kNext;
          ++me.target;
          return emit(next, who, "goes on");
        }
        me.pc = m_.add_after_look ? kRead : kAdd;
        return emit(next, who, "will sleep");
      case kAdd:
        me.late = m_.late_add;
        next.sleepers += !m_.late_add;
        me.pc = m_.add_after_look ? kWait : kRead;
        return emit(next, who, "adds itself");
      case kRead:
        me.seen = s.value;
        if (s.value < me.target) {
          me.pc = m_.add_after_look ? kAdd : kWait;
        } else {
          me.pc = m_.add_after_look ? kNext : kLeave;
        }
        return emit(next, who, "looks again");
      case kWait:
        if (me.late) return;
        me.pc = s.value == me.seen || m_.sleep_unconditionally ? kAsleep : kLeave;
        return emit(next, who, "enters the kernel");
      case kLeave:
        if (me.late) return;
        --next.sleepers;
        me.pc = kNext;
        me.seen = 0;
        return emit(next, who, "subtracts itself");
      default:
        return;
    }
  }

  const Mutation m_;
};

}  // namespace

int main() {
  holds("C3: two sleepers, two posts", CellSleep());
  fails("C3: post by a release store", CellSleep({.late_post = true}), "deadlock");
  fails("C3: sleepers looked at before the post", CellSleep({.look_first = true}), "deadlock");
  fails("C3: sleep without comparison", CellSleep({.sleep_unconditionally = true}), "deadlock");
  // The kernel compares once the entry is seen, so the sleeper's own order does not matter, unlike with bells (M8).
  holds("C3: entry by a store that is seen late", CellSleep({.late_add = true}));
  holds("C3: entry after the look", CellSleep({.add_after_look = true}));
  fails("C3: entry after the look, and no comparison",
        CellSleep({.add_after_look = true, .sleep_unconditionally = true}), "deadlock");
  return check::report();
}
