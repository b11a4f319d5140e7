// Mail between ranks (csrc/README.md, M1 to M6, M9), as a model to explore.
//
// Each thing that a rank may do at once is a move of its own, in any order: that covers every order in which steps look
// at lanes, and every thread that makes them (the lock makes the steps of one rank exclude each other). What is written
// or read, and the post that announces it, are two moves. Envelopes, grants and buffers hold the name of what was put
// there; a reader that finds another name has found a place that was overwritten too early, or read too early.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace model {

constexpr uint8_t kAnySource = 9;

struct Request {
  bool send;
  uint8_t peer, tag;
  uint8_t chunks;     // of a message sent: 0: small
  bool waits = true;  // the thread goes on once it has ended; else at once, and waits at its end
};

struct MailThread {
  uint8_t rank;
  std::vector<Request> requests;
};

struct MailMutation {
  bool post_first = false;      // C2: posts before it writes,
  bool release_first = false;   // or says that a place is free before it has read it
  int envelopes = 0;            // M2: so many more than there is room for
  int chunks = 0;               // M5
  int grants = 0;               // M4
  bool aside_ignored = false;   // M3: a new receive does not look aside,
  bool newest_aside = false;    // or at what came last first
  bool newest_receive = false;  // M3: a message goes to the newest receive
  bool newest_grant = false;    // M4: grants are not served in order
  bool gives_up_early = false;  // M9: one thing more is done after the news, not all that can be done
};

class Mail {
 public:
  static constexpr int kRanks = 3, kThreads = 4, kRequests = 12, kLanes = 4, kRing = 2;
  enum Phase : uint8_t { kNew, kUnderWay, kEnded };
  // What is done, but not posted yet (bits of Lane::half).
  enum Half : uint8_t { kEnvelope = 1, kChunk = 2, kGrant = 4, kTaken = 8, kEmptied = 16 };
  enum Error : uint8_t { kNone, kBadEnvelope, kBadGrant, kBadChunk, kReordered, kTwice, kUnfair, kLost };

  struct Progress {  // of a request
    uint8_t phase;
    uint8_t number;   // of a send: its place in the lane; of a receive: its place in the rank (from 1)
    uint8_t partner;  // the request that it has met (from 1)
    uint8_t turn;     // of a receive that has met a large message: its place among those of the lane (from 1)
    uint8_t chunks;   // written or read
  };
  struct Lane {
    uint8_t posted, filled, granted, taken, emptied;  // the cells
    uint8_t half;
    uint8_t sends, served;  // the sender's own: messages begun, grants served
    uint8_t large, ended;   // the receiver's own: large messages that have met a receive, and that have ended
    std::array<uint8_t, kRing> envelopes, grants, buffers;
  };
  struct State {
    std::array<Progress, kRequests> requests;
    std::array<Lane, kLanes> lanes;
    std::array<std::array<uint8_t, 4>, kRanks> aside;  // requests (from 1), oldest first
    std::array<uint8_t, kRanks> receives, news;
    std::array<uint8_t, kThreads> at;
    uint8_t error;
  };

  Mail(std::vector<MailThread> threads, int envelopes, int buffers, int grants, MailMutation m = {})
      : threads_(std::move(threads)), e_(envelopes), p_(buffers), g_(grants), m_(m) {
    for (const MailThread& t : threads_) {
      first_.push_back(static_cast<int>(all_.size()));
      for (const Request& r : t.requests) {
        all_.push_back(r);
        rank_.push_back(t.rank);
      }
    }
    for (int id = 0; id < count(); ++id) {
      if (all_[id].send && lane_of(id) < 0) lanes_.push_back({rank_[id], all_[id].peer});
    }
    const bool fits = all_.size() <= kRequests && lanes_.size() <= kLanes && threads_.size() <= kThreads;
    if (!fits || std::max({e_, p_, g_}) > kRing) throw std::length_error("more than a state has room for");
  }

  State initial() const { return {}; }
  const char* wrong(const State& s) const {
    constexpr const char* kTexts[] = {nullptr, "envelope", "grant",           "chunk",
                                      "order", "twice",    "younger receive", "lost"};
    return kTexts[s.error];
  }
  bool finished(const State& s) const {
    return std::all_of(s.requests.begin(), s.requests.begin() + count(),
                       [](const Progress& r) { return r.phase == kEnded; });
  }

  template <class Emit>
  void moves(const State& s, const Emit& emit) const {
    for (size_t t = 0; t < threads_.size(); ++t) start(s, t, emit);
    for (size_t l = 0; l < lanes_.size(); ++l) {
      const auto [sender, receiver] = lanes_[l];
      announce(s, l, sender, emit);
      serve(s, l, sender, emit);
      const auto received = [&](State next, int who, const char* what) {
        if (next.news[receiver]) ++next.news[receiver];
        emit(next, who, what);
      };
      take(s, l, receiver, received);
      grant(s, l, receiver, received);
      read(s, l, receiver, received);
    }
    if (m_.gives_up_early) hear(s, emit);
  }

 private:
  int count() const { return static_cast<int>(all_.size()); }
  int lane_of(int send) const {
    const auto at = std::find(lanes_.begin(), lanes_.end(), std::pair<uint8_t, uint8_t>{rank_[send], all_[send].peer});
    return at == lanes_.end() ? -1 : static_cast<int>(at - lanes_.begin());
  }

  // ---- requests ----

  template <class Emit>
  void start(const State& s, size_t t, const Emit& emit) const {
    const int at = s.at[t];
    if (at == static_cast<int>(threads_[t].requests.size())) return;
    const int id = first_[t] + at;
    if (at > 0 && all_[id - 1].waits && s.requests[id - 1].phase != kEnded) return;
    State next = s;
    ++next.at[t];
    next.requests[id].phase = kUnderWay;
    if (all_[id].send) {
      next.requests[id].number = ++next.lanes[lane_of(id)].sends;
    } else {
      next.requests[id].number = ++next.receives[rank_[id]];
      look_aside(next, id);
    }
    emit(next, rank_[id], all_[id].send ? "starts to send" : "starts to receive");
  }

  // Whether message `send` may go to receive `id`, as the call was made.
  bool suits(int id, int send) const {
    const Request& r = all_[id];
    return !r.send && rank_[id] == all_[send].peer && r.tag == all_[send].tag &&
           (r.peer == kAnySource || r.peer == rank_[send]);
  }

  void look_aside(State& s, int id) const {  // M3
    auto& aside = s.aside[rank_[id]];
    int found = -1;
    for (int i = 0; i < static_cast<int>(aside.size()) && aside[i]; ++i) {
      if (suits(id, aside[i] - 1) && (found < 0 || m_.newest_aside)) found = i;
    }
    if (found < 0 || m_.aside_ignored) return;
    const int send = aside[found] - 1;
    std::copy(aside.begin() + found + 1, aside.end(), aside.begin() + found);
    aside.back() = 0;
    meet(s, id, send);
  }

  // The oldest receive that waits for this message, or -1.
  int waiting_for(const State& s, int send, bool newest) const {
    int found = -1;
    for (int id = 0; id < count(); ++id) {
      const Progress& r = s.requests[id];
      if (r.phase != kUnderWay || r.partner || !suits(id, send)) continue;
      if (found < 0 || (r.number < s.requests[found].number) != newest) found = id;
    }
    return found;
  }

  void meet(State& s, int id, int send) const {
    Progress &r = s.requests[id], &m = s.requests[send];
    if (m.partner) s.error = kTwice;
    if (waiting_for(s, send, false) != id) s.error = kUnfair;
    for (int other = 0; other < count(); ++other) {  // an older message of this sender and tag
      const bool same = all_[other].send && lane_of(other) == lane_of(send) && all_[other].tag == all_[send].tag;
      const Progress& o = s.requests[other];
      if (same && o.phase != kNew && o.number < m.number && !o.partner) s.error = kReordered;
    }
    r.partner = static_cast<uint8_t>(send + 1);
    m.partner = static_cast<uint8_t>(id + 1);
    if (all_[send].chunks == 0) {
      r.phase = kEnded;
    } else {
      r.turn = ++s.lanes[lane_of(send)].large;
    }
  }

  // ---- a place and its cell: two moves ----

  // `first` is what comes before the post of `cell`, or after it where the order is wrong.
  template <class First, class Post, class Emit>
  void in_two(const State& s, size_t lane, Half half, bool wrong_order, int who, const char* first_text,
              const char* post_text, const First& first, const Post& post, const Emit& emit) const {
    State next = s;
    const bool second = (s.lanes[lane].half & half) != 0;
    next.lanes[lane].half ^= half;
    if (second == wrong_order) {
      first(next);
      emit(next, who, first_text);
    } else {
      post(next);
      emit(next, who, post_text);
    }
  }
  static bool pending(const State& s, size_t lane, Half half) { return (s.lanes[lane].half & half) != 0; }

  int message(const State& s, size_t lane, int number) const {
    for (int id = 0; id < count(); ++id) {
      if (all_[id].send && lane_of(id) == static_cast<int>(lane) && s.requests[id].number == number) return id;
    }
    return -1;
  }
  int receive_of_turn(const State& s, size_t lane, int turn) const {
    for (int id = 0; id < count(); ++id) {
      const Progress& r = s.requests[id];
      if (!all_[id].send && r.turn == turn && lane_of(r.partner - 1) == static_cast<int>(lane)) return id;
    }
    return -1;
  }

  // ---- the sender's half of a step ----

  template <class Emit>
  void announce(const State& s, size_t l, int who, const Emit& emit) const {  // M2
    const Lane& lane = s.lanes[l];
    const int number = lane.posted + (m_.post_first && pending(s, l, kEnvelope) ? 0 : 1);
    if (!pending(s, l, kEnvelope) && (number > lane.sends || number - lane.taken > e_ + m_.envelopes)) return;
    const int id = message(s, l, number);
    const auto write = [&](State& n) { n.lanes[l].envelopes[number % e_] = static_cast<uint8_t>(id + 1); };
    const auto post = [&](State& n) {
      ++n.lanes[l].posted;
      if (all_[id].chunks == 0) n.requests[id].phase = kEnded;
    };
    in_two(s, l, kEnvelope, m_.post_first, who, "writes an envelope", "posts an envelope", write, post, emit);
  }

  template <class Emit>
  void serve(const State& s, size_t l, int who, const Emit& emit) const {  // M4, M5
    const Lane& lane = s.lanes[l];
    const bool half = pending(s, l, kChunk);
    const int chunk = lane.filled + (m_.post_first && half ? 0 : 1);
    if (!half && (lane.granted == lane.served || chunk - lane.emptied > p_ + m_.chunks)) return;
    const int grant = m_.newest_grant ? lane.granted : lane.served + 1;
    const int id = lane.grants[grant % g_] - 1;
    const int receive = receive_of_turn(s, l, lane.served + 1);
    if (id < 0 || (!m_.newest_grant && (receive < 0 || s.requests[receive].partner != id + 1))) {
      State next = s;
      next.error = kBadGrant;
      return emit(next, who, "reads a grant");
    }
    const auto write = [&](State& n) {
      n.lanes[l].buffers[chunk % p_] = static_cast<uint8_t>(16 * (id + 1) + n.requests[id].chunks);
    };
    const auto post = [&](State& n) { ++n.lanes[l].filled; };
    const auto second = [&](const State& n, int w, const char* what) {
      if (!half) return emit(n, w, what);
      State done = n;
      if (++done.requests[id].chunks == all_[id].chunks) {
        done.requests[id].phase = kEnded;
        ++done.lanes[l].served;
      }
      emit(done, w, what);
    };
    in_two(s, l, kChunk, m_.post_first, who, "writes a chunk", "posts a chunk", write, post, second);
  }

  // ---- the receiver's half of a step ----

  template <class Emit>
  void take(const State& s, size_t l, int who, const Emit& emit) const {  // M3
    const Lane& lane = s.lanes[l];
    const bool half = pending(s, l, kTaken);
    const int number = lane.taken + (m_.release_first && half ? 0 : 1);
    if (!half && (number > lane.posted || !wants(s, l))) return;
    const auto look = [&](State& n) {
      const int id = message(n, l, number);
      if (n.lanes[l].envelopes[number % e_] != id + 1) {
        n.error = kBadEnvelope;
        return;
      }
      const int receive = waiting_for(n, id, m_.newest_receive);
      if (receive >= 0) return meet(n, receive, id);
      auto& aside = n.aside[who];
      *std::find(aside.begin(), aside.end(), 0) = static_cast<uint8_t>(id + 1);
    };
    const auto post = [&](State& n) { ++n.lanes[l].taken; };
    in_two(s, l, kTaken, m_.release_first, who, "takes an envelope", "posts that it took one", look, post, emit);
  }

  // Whether the rank has a receive that may be answered from this lane.
  bool wants(const State& s, size_t l) const {
    for (int id = 0; id < count(); ++id) {
      const Progress& r = s.requests[id];
      const bool here =
          rank_[id] == lanes_[l].second && (all_[id].peer == kAnySource || all_[id].peer == lanes_[l].first);
      if (!all_[id].send && r.phase == kUnderWay && !r.partner && here) return true;
    }
    return false;
  }

  template <class Emit>
  void grant(const State& s, size_t l, int who, const Emit& emit) const {  // M4
    const Lane& lane = s.lanes[l];
    const bool half = pending(s, l, kGrant);
    const int grant = lane.granted + (m_.post_first && half ? 0 : 1);
    if (!half && (grant > lane.large || lane.granted - lane.ended >= g_ + m_.grants)) return;
    const auto write = [&](State& n) {
      n.lanes[l].grants[grant % g_] = n.requests[receive_of_turn(n, l, grant)].partner;
    };
    const auto post = [&](State& n) { ++n.lanes[l].granted; };
    in_two(s, l, kGrant, m_.post_first, who, "writes a grant", "posts a grant", write, post, emit);
  }

  template <class Emit>
  void read(const State& s, size_t l, int who, const Emit& emit) const {  // M5
    const Lane& lane = s.lanes[l];
    const bool half = pending(s, l, kEmptied);
    const int chunk = lane.emptied + (m_.release_first && half ? 0 : 1);
    if (!half && chunk > lane.filled) return;
    const int id = receive_of_turn(s, l, lane.ended + 1);
    const auto look = [&](State& n) {
      if (n.lanes[l].buffers[chunk % p_] != 16 * n.requests[id].partner + n.requests[id].chunks) n.error = kBadChunk;
    };
    const auto post = [&](State& n) { ++n.lanes[l].emptied; };
    const auto second = [&](const State& n, int w, const char* what) {
      if (!half) return emit(n, w, what);
      State done = n;
      if (++done.requests[id].chunks == all_[done.requests[id].partner - 1].chunks) {
        done.requests[id].phase = kEnded;
        ++done.lanes[l].ended;
      }
      emit(done, w, what);
    };
    in_two(s, l, kEmptied, m_.release_first, who, "reads a chunk", "posts that it read one", look, post, second);
  }

  // ---- ranks that leave (M9) ----

  // A rank whose threads have ended leaves. All that was sent can still be received, so whoever gives up has lost it.
  template <class Emit>
  void hear(const State& s, const Emit& emit) const {
    for (uint8_t rank = 0; rank < kRanks; ++rank) {
      bool waits = false, others_left = true;
      for (int id = 0; id < count(); ++id) {
        waits |= rank_[id] == rank && s.requests[id].phase == kUnderWay;
        others_left &= rank_[id] == rank || s.requests[id].phase == kEnded;
      }
      if (!waits || !others_left || s.news[rank] == 1) continue;
      State next = s;
      if (s.news[rank] == 0) {
        next.news[rank] = 1;
        emit(next, rank, "hears that all others have left");
      } else {
        next.error = kLost;
        emit(next, rank, "gives up");
      }
    }
  }

  const std::vector<MailThread> threads_;
  const int e_, p_, g_;
  const MailMutation m_;
  std::vector<Request> all_;
  std::vector<uint8_t> rank_;  // of each request
  std::vector<int> first_;     // request of each thread
  std::vector<std::pair<uint8_t, uint8_t>> lanes_;
};

}  // namespace model
