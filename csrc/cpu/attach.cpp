#include "cpu/attach.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "core/atomic.h"
#include "cpu/descriptors.h"
#include "cpu/error.h"
#include "cpu/rendezvous.h"

namespace pycoll::cpu {

namespace {

class Attach {
 public:
  Attach(Store& store, int rank, int world, const Config& config, const Names& names, Clock::time_point deadline,
         const std::function<void()>& interrupt)
      : rank_(rank),
        world_(world),
        config_(config),
        names_(names),
        deadline_(deadline),
        interrupt_(interrupt),
        others_(store, rank, world, names, deadline, interrupt) {}

  std::shared_ptr<Attachment> run() {
    listen_and_greet();
    auto result = std::make_shared<Attachment>();
    result->origin = Instant::now();
    try {
      const std::vector<Hello> hellos = others_.hellos();
      settle(hellos, *result);
      push_to_all(hellos, *result);
    } catch (const Error& e) {
      others_.say_failed(e);
      throw;
    } catch (const std::exception& e) {
      const std::string why = "pycoll: " + names_.rank(rank_) + " failed while the ranks met: " + e.what();
      others_.say_failed(Error(ErrorKind::kError, why, rank_));
      throw;
    }
    others_.say_reached_all();
    try {
      others_.hear_all([&] { take_what_came(*result, std::chrono::milliseconds(0)); });
      take_in(*result);
    } catch (...) {  // the others, who count on this rank by now, find that it has left
      store_release(reinterpret_cast<Control*>(result->segments[rank_].data())->departed, uint32_t{1});
      throw;
    }
    if (rank_ == 0) result->store_keys = others_.keys();
    return result;
  }

 private:
  void listen_and_greet() {
    std::memcpy(mine_.token, box_.token().c_str(), sizeof(mine_.token));
    mine_.place = socket_place();
    mine_.world = world_;
    mine_.cores = available_cores();
    mine_.wishes = config_;
    if (mine_.wishes.channels == 0) mine_.wishes.channels = std::clamp(mine_.cores / world_, 1, 4);
    others_.greet(mine_);
  }

  // The minimum of all wishes; then this rank's segment in that shape.
  void settle(const std::vector<Hello>& hellos, Attachment& a) {
    std::vector<Config> wishes;
    a.cores = hellos[0].cores;
    for (const Hello& h : hellos) {
      wishes.push_back(h.wishes);
      a.cores = std::min(a.cores, h.cores);
    }
    const Config c = Config::least(wishes);
    a.rank = rank_;
    a.id = std::string(hellos[0].token, 16);
    a.names = names_;
    a.one_shot_max_bytes = c.one_shot_max_bytes;
    a.channel_min_bytes = std::max<size_t>(c.channel_min_bytes, 1);
    // A place of at least one cache line for every rank.
    const size_t slot = std::max(round_up(c.slot_bytes, 64), size_t{64} * world_);
    a.geometry = {world_,
                  std::max(c.channels, 1),
                  std::max(c.link_slots, 2),
                  slot,
                  std::max(round_up(c.link_bytes, 64), size_t{64}),
                  round_up(c.heap_bytes, Geometry::kPage)};
    a.geometry.mail_bytes = std::max(round_up(c.mail_bytes, 64), size_t{64});
    a.keeper = Keeper::get();
    segment_ = create_shared_memory("pycoll-segment", a.geometry.segment_bytes());
    a.segments.resize(world_);
    a.segments[rank_] = Mapping(segment_.get(), a.geometry.segment_bytes());
    prefault(a.segments[rank_].data(), a.geometry.scratch_bytes());
    reinterpret_cast<Control*>(a.segments[rank_].data())->pid = static_cast<uint32_t>(getpid());
    liveness_fd_ = a.keeper->page_fd();
    a.liveness.resize(world_);
  }

  // All ranks take in what has come while they push: there is room for few descriptors under way at a time.
  void push_to_all(const std::vector<Hello>& hellos, Attachment& a) {
    using Sent = DescriptorBox::Sent;
    const int descriptors[] = {segment_.get(), liveness_fd_};
    std::vector<int> gone, unreached, left;
    for (int r = 0; r < world_; ++r) {
      if (r != rank_) left.push_back(r);
    }
    while (!left.empty()) {
      std::vector<int> later;
      for (const int r : left) {
        const Sent sent = DescriptorBox::send(hellos[r].token, rank_, 0, descriptors);
        if (sent == Sent::kYes) continue;
        // Where its socket would be within reach it has gone.
        const bool near = mine_.place != 0 && hellos[r].place == mine_.place;
        (sent == Sent::kNoRoom ? later : sent == Sent::kNoSuchBox && near ? gone : unreached).push_back(r);
      }
      left = later;
      if (left.empty()) break;
      if (Clock::now() > deadline_) throw no_room(left);
      interrupt_();
      take_what_came(a, std::chrono::milliseconds(5));
    }
    if (!gone.empty()) throw_lost(gone);
    if (unreached.empty()) return;
    throw Error(ErrorKind::kUnsupported,
                "pycoll: " + names_.rank(rank_) + " shares no memory with " + names_.ranks(unreached) +
                    ": all ranks must run on one machine, in one network namespace and as one user",
                unreached.front());
  }

  Error no_room(const std::vector<int>& ranks) const {
    return Error(ErrorKind::kTimeout,
                 "pycoll: " + names_.rank(rank_) + " could not hand its memory to " + names_.ranks(ranks) +
                     " in time: too many file descriptors of this user are under way. Raise the limit of open files",
                 ranks.front());
  }

  // Whoever gives up says why before its socket goes; the others have died.
  [[noreturn]] void throw_lost(const std::vector<int>& gone) {
    std::vector<int> silent;
    for (const int r : gone) {
      if (!others_.has_reported(r)) silent.push_back(r);
    }
    const std::vector<int>& lost = silent.empty() ? gone : silent;
    throw Error(
        ErrorKind::kPeerLost,
        "pycoll: " + names_.ranks(lost) + (lost.size() == 1 ? " is" : " are") + " lost: gone while the ranks met",
        lost.front());
  }

  // All peers have said that their pushes lie in this rank's socket.
  void take_in(Attachment& a) {
    while (mapped_ < world_ - 1) {
      if (take_what_came(a, std::chrono::milliseconds(20))) continue;
      if (Clock::now() > deadline_) throw Error(ErrorKind::kTimeout, "pycoll: a peer's segment did not arrive in time");
      interrupt_();
    }
    for (const Mapping& m : a.segments) a.base.push_back(m.data());
  }

  // False: nothing has, within `patience`.
  bool take_what_came(Attachment& a, std::chrono::milliseconds patience) {
    bool any = false;
    while (const std::optional<Delivery> delivery = box_.take(any ? std::chrono::milliseconds(0) : patience)) {
      any = true;
      map(*delivery, a);
    }
    return any;
  }

  void map(const Delivery& delivery, Attachment& a) {
    const int r = delivery.sender;
    const bool expected =
        delivery.descriptors.size() == 2 && r >= 0 && r < world_ && r != rank_ && a.segments[r].data() == nullptr;
    if (!expected) return;
    a.segments[r] = Mapping(delivery.descriptors[0].get(), a.geometry.segment_bytes());
    prefault(a.segments[r].data(), a.geometry.scratch_bytes());
    a.liveness[r] = PeerLiveness(delivery.descriptors[1]);
    ++mapped_;
  }

  const int rank_, world_;
  const Config& config_;
  const Names& names_;
  const Clock::time_point deadline_;
  const std::function<void()>& interrupt_;
  Hello mine_{};
  DescriptorBox box_{world_};
  Rendezvous others_;
  Fd segment_;
  int liveness_fd_ = -1;
  int mapped_ = 0;  // segments of peers
};

}  // namespace

Config Config::least(const std::vector<Config>& wishes) {
  Config c = wishes[0];
  for (const Config& w : wishes) {
    c.channels = std::min(c.channels, w.channels);
    c.link_slots = std::min(c.link_slots, w.link_slots);
    c.slot_bytes = std::min(c.slot_bytes, w.slot_bytes);
    c.link_bytes = std::min(c.link_bytes, w.link_bytes);
    c.mail_bytes = std::min(c.mail_bytes, w.mail_bytes);
    c.heap_bytes = std::min(c.heap_bytes, w.heap_bytes);
    c.one_shot_max_bytes = std::min(c.one_shot_max_bytes, w.one_shot_max_bytes);
    c.channel_min_bytes = std::min(c.channel_min_bytes, w.channel_min_bytes);
    c.word_bytes = std::min(c.word_bytes, w.word_bytes);
    c.one_shot_ll_max_bytes = std::min(c.one_shot_ll_max_bytes, w.one_shot_ll_max_bytes);
    c.two_shot_ll_max_bytes = std::min(c.two_shot_ll_max_bytes, w.two_shot_ll_max_bytes);
  }
  return c;
}

std::shared_ptr<Attachment> attach(Store& store, int rank, int world, const Config& config, const Names& names,
                                   Clock::time_point deadline, const std::function<void()>& interrupt) {
  Attach attaching(store, rank, world, config, names, deadline, interrupt);
  return attaching.run();
}

}  // namespace pycoll::cpu
