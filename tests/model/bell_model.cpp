// Doorbells (csrc/README.md, M6 and M8): two threads of one rank wait for messages, a third one of the other sends them.
//
// Both messages are large: each needs its receive, a grant and a chunk, and only one may be granted at a time (G = 1).
// So a receive may need several steps of whoever makes them, and each rank must wake the other. A step takes its rank's
// lock, and a thread looks at its own request again after the step that it makes before it sleeps. Envelopes have room
// enough, so nobody waits for `taken`. A nap has no end here: a lost wake-up is a deadlock.
#include <algorithm>
#include <array>

#include "report.h"

using namespace model;

namespace {

struct Mutation {
  bool late_entry = false;        // the entry in `sleepers` is seen later than the loads of the step are made
  bool look_first = false;        // the poster looks at the sleepers, then posts
  bool bell_after_step = false;   // the sleeper reads the bell's counter after its step,
  bool no_second_look = false;    // or does not look at its own request after it,
  bool try_lock = false;          // or counts a step that it could not make as one that moved nothing
  bool no_step_at_start = false;  // who starts an asynchronous request leaves all steps to whoever makes them
  bool handover = false;          // the communicator's thread sleeps elsewhere while somebody else makes steps
};

// What the two threads of the receiver do:
//   kBothWait      each waits for one receive
//   kAsynchronous  the first starts both, the second is the communicator's thread, which waits for them
//   kReversed      as that, but the message for the second receive comes first, and the other one once it has ended
//   kMixed         the first starts one for the communicator's thread, and waits for the other
enum class Scene { kBothWait, kAsynchronous, kReversed, kMixed };

class Bells {
 public:
  enum Pc : uint8_t { kNext, kLook, kReadBell, kLock, kStep, kPost, kRing, kSleep, kAsleep, kEnd };
  static constexpr int kThreads = 3, kMessages = 2, kNone = 9;
  struct Thread {
    uint8_t pc;
    uint8_t started;     // requests that it has started,
    uint8_t awaits;      // and which it waits for
    uint8_t entered;     // in `sleepers`: 1, or 2 while nobody sees it
    uint8_t seen;        // of the bell
    uint8_t tried;       // made a step without entry since something moved last
    uint8_t starting;    // the steps that belong to the start of a request
    uint8_t job, moved;  // of its step
  };
  struct State {
    std::array<uint8_t, 2> bell, sleepers, locked;  // of each rank
    uint8_t posted, granted, filled;                // cells
    uint8_t taken, aside;                           // envelopes: how many, and which has not met its receive
    uint8_t started, matched, read;                 // receives: how many
    std::array<uint8_t, kMessages> order;           // and which have met their messages, in the order of that
    std::array<Thread, kThreads> threads;           // 0: the sender
  };

  explicit Bells(Scene scene, Mutation m = {}) : scene_(scene), m_(m) {}

  State initial() const {
    State s{};
    for (Thread& t : s.threads) t.awaits = kNone;
    s.aside = kNone;
    s.threads[0].pc = kLook;  // both sends are under way
    return s;
  }
  const char* wrong(const State&) const { return nullptr; }
  bool finished(const State& s) const {
    for (const Thread& t : s.threads) {
      if (t.pc != kEnd) return false;
    }
    return s.read == kMessages;
  }
  template <class Emit>
  void moves(const State& s, const Emit& emit) const {
    for (int i = 0; i < kThreads; ++i) {
      if (s.threads[i].entered == 2) {
        State next = s;
        next.threads[i].entered = 1;
        ++next.sleepers[rank(i)];
        emit(next, i, "its entry is seen");
      }
      State next = s;
      if (const char* what = move(next, i, emit)) emit(next, i, what);
    }
  }

 private:
  static int rank(int thread) { return thread == 0 ? 0 : 1; }
  bool is_worker(int thread) const { return thread == 2 && scene_ != Scene::kBothWait; }
  int requests(int thread) const { return is_worker(thread) ? 0 : scene_ == Scene::kBothWait ? 1 : 2; }
  bool waits_for(int request) const {  // the caller waits; else the worker does
    return scene_ == Scene::kBothWait || (scene_ == Scene::kMixed && request == 1);
  }
  bool has_ended(const State& s, int i) const {
    if (i == 0) return s.filled == kMessages;
    if (is_worker(i)) return s.read == s.started;
    return std::find(s.order.begin(), s.order.begin() + s.read, s.threads[i].awaits) != s.order.begin() + s.read;
  }

  static void leave(State& s, int i) {
    s.sleepers[rank(i)] -= s.threads[i].entered == 1;
    s.threads[i].entered = 0;
    s.threads[i].seen = 0;
  }
  static void go_on(State& s, int i) {
    leave(s, i);
    s.threads[i].pc = kLook;
    s.threads[i].tried = 0;
  }
  void enter(State& s, int i) const {
    s.threads[i].entered = m_.late_entry ? 2 : 1;
    s.sleepers[rank(i)] += !m_.late_entry;
  }
  void ring(State& s, int r) const {
    if (s.sleepers[r] == 0) return;
    ++s.bell[r];
    for (int i = 0; i < kThreads; ++i) {
      if (rank(i) == r && s.threads[i].pc == kAsleep) go_on(s, i);
    }
  }

  // The move of thread `i`, made in `s`: what it was, or null where it can make none. Another choice is emitted here.
  template <class Emit>
  const char* move(State& s, int i, const Emit& emit) const {
    Thread& me = s.threads[i];
    const int r = rank(i);
    switch (me.pc) {
      case kNext:
        if (is_worker(i)) return begin_work(s, i);
        if (me.started == requests(i)) {
          me.pc = kEnd;
          return "ends";
        }
        if (s.locked[r]) return nullptr;
        me.awaits = s.started++;
        ++me.started;
        if (s.aside == me.awaits) {
          s.order[s.matched++] = me.awaits;
          s.aside = kNone;
        }
        if (m_.no_step_at_start) {
          go_on_after_start(s, i);
        } else {
          me.starting = 1;
          begin_step(s, i);
        }
        return "starts a receive";
      case kLook:
        if (has_ended(s, i)) {
          leave(s, i);
          me.tried = 0;
          me.awaits = kNone;
          me.pc = i == 0 ? kEnd : kNext;
          return "has what it waits for";
        }
        if (m_.handover && is_worker(i) && s.threads[1].awaits != kNone) {
          me.pc = kAsleep;
          return "leaves it to the other";
        }
        if (!me.tried) {
          State step = s;
          step.threads[i].tried = 1;
          step.threads[i].pc = kLock;
          emit(step, i, "does not sleep yet");
        }
        enter(s, i);
        me.pc = m_.bell_after_step ? kLock : kReadBell;
        me.tried = 1;
        return "adds itself";
      case kReadBell:
        me.seen = s.bell[r];
        me.pc = m_.bell_after_step ? kSleep : kLock;
        return "reads the bell";
      case kLock:
        if (s.locked[r] && !m_.try_lock) return nullptr;
        if (s.locked[r]) {
          me.pc = me.entered ? kSleep : kLook;
          return "cannot make a step";
        }
        begin_step(s, i);
        return "begins a step";
      case kStep:
        return step(s, i);
      case kPost:
        ++*cell_to_post(s, i);
        return end_job(s, i, "posts");
      case kRing:
        ring(s, 1 - r);
        if (!m_.look_first) return end_job(s, i, "looks at the sleepers");
        me.pc = kPost;
        return "looks at the sleepers";
      case kSleep:
        if (me.entered == 2) return nullptr;  // the kernel is entered with all stores seen
        if (s.bell[r] != me.seen) {
          go_on(s, i);
          return "finds the bell rung";
        }
        me.pc = kAsleep;
        return "sleeps";
      default:
        return nullptr;
    }
  }

  // The communicator's thread waits while asynchronous receives are under way.
  const char* begin_work(State& s, int i) const {
    if (s.read < s.started) {
      s.threads[i].pc = kLook;
      return "finds receives under way";
    }
    if (s.started < kMessages) return nullptr;
    s.threads[i].pc = kEnd;
    return "ends";
  }

  static void begin_step(State& s, int i) {
    s.locked[rank(i)] = 1;
    s.threads[i].pc = kStep;
    s.threads[i].job = s.threads[i].moved = 0;
  }

  // Which receive a message is for, and whether the sender has come to it.
  int receive_of(int message) const { return scene_ == Scene::kReversed ? 1 - message : message; }
  bool can_announce(const State& s) const {
    return s.posted < kMessages && (scene_ != Scene::kReversed || s.filled == s.posted);
  }

  const char* step(State& s, int i) const {
    Thread& me = s.threads[i];
    uint8_t* const cell = cell_to_post(s, i);
    if (cell) {
      me.moved = 1;
      me.pc = kRing;
      if (!m_.look_first) ++*cell;
      return m_.look_first ? "will post" : "posts";
    }
    if (i != 0 && me.job == 1 && s.taken < s.posted && s.matched < s.started) {  // M3
      const uint8_t receive = static_cast<uint8_t>(receive_of(s.taken++));
      if (receive < s.started) {
        s.order[s.matched++] = receive;
      } else {
        s.aside = receive;
      }
      me.moved = 1;
      return end_job(s, i, "takes an envelope");
    }
    if (i != 0 && me.job == 2 && s.filled > s.read) {
      ++s.read;
      me.moved = 1;
      return end_job(s, i, "reads a chunk");
    }
    return end_job(s, i, "finds nothing to do");
  }

  // What the job of this step that comes next would post.
  uint8_t* cell_to_post(State& s, int i) const {
    const int job = s.threads[i].job;
    if (i == 0) return job == 0 && can_announce(s) ? &s.posted : job == 1 && s.granted > s.filled ? &s.filled : nullptr;
    return job == 0 && s.granted < s.matched && s.granted == s.read ? &s.granted : nullptr;  // M4, G = 1
  }

  const char* end_job(State& s, int i, const char* what) const {
    Thread& me = s.threads[i];
    me.pc = kStep;
    if (++me.job < (i == 0 ? 2 : 3)) return what;
    me.job = 0;
    s.locked[rank(i)] = 0;
    const bool moved = me.moved != 0;
    me.moved = 0;
    if (me.starting) {
      go_on_after_start(s, i);
    } else if (moved) {
      go_on(s, i);
    } else if (!me.entered) {
      me.pc = kLook;
    } else if (!m_.no_second_look && has_ended(s, i)) {
      go_on(s, i);
    } else {
      me.pc = m_.bell_after_step ? kReadBell : kSleep;
    }
    return what;
  }

  void go_on_after_start(State& s, int i) const {
    Thread& me = s.threads[i];
    const bool waits = waits_for(me.awaits);
    if (!waits) me.awaits = kNone;
    me.starting = 0;
    me.pc = waits ? kLook : kNext;
  }

  const Scene scene_;
  const Mutation m_;
};

}  // namespace

int main() {
  holds("M8: two threads wait", Bells(Scene::kBothWait));
  holds("M8: asynchronous receives", Bells(Scene::kAsynchronous));
  holds("M8: asynchronous receives, reversed", Bells(Scene::kReversed));
  holds("M8: one of each", Bells(Scene::kMixed));
  const auto deadlock = [](const char* name, Scene scene, const Mutation& m) {
    fails(name, Bells(scene, m), "deadlock");
  };
  deadlock("M8: late entry", Scene::kAsynchronous, {.late_entry = true});
  deadlock("M8: looks at the sleepers before the post", Scene::kAsynchronous, {.look_first = true});
  deadlock("M8: bell read after the step", Scene::kAsynchronous, {.bell_after_step = true});
  deadlock("M8: no second look", Scene::kMixed, {.no_second_look = true});
  deadlock("M8: try lock", Scene::kAsynchronous, {.try_lock = true});
  deadlock("M6: no step at the start", Scene::kReversed, {.no_step_at_start = true});
  deadlock("M6: handover", Scene::kMixed, {.handover = true});
  return check::report();
}
