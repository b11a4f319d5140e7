#include "cpu/attach.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "core/atomic.h"
#include "cpu/descriptors.h"
#include "cpu/error.h"

namespace pycoll::cpu {

namespace {

constexpr uint64_t kProtocol = 0x70796306;  // changes whenever a segment's layout or its use does
constexpr const char* kReachedAll = "0";    // else an error: its kind, the rank to blame, a space and its text

struct Hello {
  uint64_t protocol;
  char token[33];  // of the rank's DescriptorBox
  uint64_t place;
  int32_t world, cores;
  Config wishes;
};

template <class T>
std::string to_bytes(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

template <class T>
T from_bytes(const std::string& bytes) {
  T value{};
  if (bytes.size() != sizeof(T)) throw Error(ErrorKind::kError, "pycoll: ranks run different versions of pycoll");
  std::memcpy(&value, bytes.data(), sizeof(T));
  return value;
}

std::string list(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size() && i < 16; ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return ranks.size() > 16 ? text + ", ..." : text;
}

class Attach {
 public:
  Attach(Store& store, int rank, int world, const Config& config, Clock::time_point deadline,
         const std::function<void()>& interrupt)
      : store_(store), rank_(rank), world_(world), config_(config), deadline_(deadline), interrupt_(interrupt) {}

  std::shared_ptr<Attachment> run() {
    // A store may still hold keys of an earlier communicator of the same name: count them.
    prefix_ = std::to_string(store_.add("count/" + std::to_string(rank_), 1)) + "/";
    listen_and_greet();
    auto result = std::make_shared<Attachment>();
    result->origin = Instant::now();
    try {
      const std::vector<Hello> hellos = read_hellos();
      settle(hellos, *result);
      push_to_all(hellos, *result);
    } catch (const Error& e) {
      say_failed(e.kind, e.rank, e.what());
      throw;
    } catch (const std::exception& e) {
      say_failed(ErrorKind::kError, rank_,
                 "pycoll: rank " + std::to_string(rank_) + " failed while the ranks met: " + e.what());
      throw;
    }
    store_.set(key("reached", rank_), kReachedAll);
    try {
      hear_others(*result);
      take_in(*result);
    } catch (...) {  // the others, who count on this rank by now, find that it has left
      store_release(reinterpret_cast<Control*>(result->segments[rank_].data())->departed, uint32_t{1});
      throw;
    }
    for (int r = 0; rank_ == 0 && r < world_; ++r) {
      for (const char* what : {"hello", "reached"}) result->store_keys.push_back(key(what, r));
    }
    return result;
  }

 private:
  std::string key(const char* what, int rank) const { return prefix_ + what + "/" + std::to_string(rank); }

  void listen_and_greet() {
    std::memcpy(mine_.token, box_.token().c_str(), sizeof(mine_.token));
    mine_.protocol = kProtocol;
    mine_.place = socket_place();
    mine_.world = world_;
    mine_.cores = available_cores();
    mine_.wishes = config_;
    if (mine_.wishes.channels == 0) mine_.wishes.channels = std::clamp(mine_.cores / world_, 1, 4);
    store_.set(key("hello", rank_), to_bytes(mine_));
  }

  void say_failed(ErrorKind kind, int rank, const std::string& text) {
    store_.set(key("reached", rank_),
               static_cast<char>('0' + static_cast<int>(kind)) + std::to_string(rank) + " " + text);
  }

  // Every value of `what`, as soon as all ranks have set theirs. `meanwhile` is called now and then.
  std::vector<std::string> await_all(const char* what, const std::function<void()>& meanwhile) {
    auto pause = std::chrono::microseconds(200);
    std::vector<std::string> values(world_);
    for (int r = 0; r < world_;) {
      if (store_.has(key(what, r))) {
        values[r] = store_.get(key(what, r));
        ++r;
        continue;
      }
      if (Clock::now() > deadline_) throw missing(what);
      interrupt_();
      meanwhile();
      std::this_thread::sleep_for(pause);
      pause = std::min(pause * 3 / 2, std::chrono::microseconds(20000));
    }
    return values;
  }

  Error missing(const char* what) {
    std::vector<int> ranks;
    for (int r = 0; r < world_; ++r) {
      if (!store_.has(key(what, r))) ranks.push_back(r);
    }
    if (ranks.empty()) ranks.push_back(world_ - 1);  // it came as we gave up
    return Error(ErrorKind::kTimeout,
                 "pycoll: " + list(ranks) + " of " + std::to_string(world_) +
                     " did not join in time. Were all ranks started, with the same world size and store, and do all "
                     "create this communicator? Raise the timeout if they are slow",
                 ranks.front());
  }

  std::vector<Hello> read_hellos() {
    std::vector<Hello> hellos;
    for (const std::string& bytes : await_all("hello", [] {})) {
      hellos.push_back(from_bytes<Hello>(bytes));
      if (hellos.back().protocol != kProtocol) {
        throw Error(ErrorKind::kError, "pycoll: ranks run different versions of pycoll");
      }
      if (hellos.back().world != world_) {
        throw Error(ErrorKind::kMismatch, "pycoll: rank " + std::to_string(hellos.size() - 1) +
                                              " says the world size is " + std::to_string(hellos.back().world) +
                                              ", rank " + std::to_string(rank_) + " says " + std::to_string(world_));
      }
    }
    return hellos;
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
                "pycoll: rank " + std::to_string(rank_) + " shares no memory with " + list(unreached) +
                    ": all ranks must run on one machine, in one network namespace and as one user",
                unreached.front());
  }

  Error no_room(const std::vector<int>& ranks) const {
    return Error(ErrorKind::kTimeout,
                 "pycoll: rank " + std::to_string(rank_) + " could not hand its memory to " + list(ranks) +
                     " in time: too many file descriptors of this user are under way. Raise the limit of open files",
                 ranks.front());
  }

  // Whoever gives up says why before its socket goes; the others have died.
  [[noreturn]] void throw_lost(const std::vector<int>& gone) {
    std::vector<int> silent;
    for (const int r : gone) {
      if (!store_.has(key("reached", r))) {
        silent.push_back(r);
      } else {
        throw_if_failed(store_.get(key("reached", r)));
      }
    }
    const std::vector<int>& lost = silent.empty() ? gone : silent;
    throw Error(ErrorKind::kPeerLost,
                "pycoll: " + list(lost) + (lost.size() == 1 ? " is" : " are") + " lost: gone while the ranks met",
                lost.front());
  }

  static void throw_if_failed(const std::string& said) {
    if (said == kReachedAll) return;
    const size_t space = said.find(' ');
    throw Error(static_cast<ErrorKind>(said.at(0) - '0'), said.substr(space + 1), std::stoi(said.substr(1)));
  }

  void hear_others(Attachment& a) {
    const auto said = await_all("reached", [&] { take_what_came(a, std::chrono::milliseconds(0)); });
    for (const std::string& each : said) throw_if_failed(each);
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

  Store& store_;
  const int rank_, world_;
  const Config& config_;
  const Clock::time_point deadline_;
  const std::function<void()>& interrupt_;
  std::string prefix_;
  Hello mine_{};
  DescriptorBox box_{world_};
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

std::shared_ptr<Attachment> attach(Store& store, int rank, int world, const Config& config, Clock::time_point deadline,
                                   const std::function<void()>& interrupt) {
  Attach attaching(store, rank, world, config, deadline, interrupt);
  return attaching.run();
}

}  // namespace pycoll::cpu
