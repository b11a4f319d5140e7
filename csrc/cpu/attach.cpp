#include "cpu/attach.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "core/atomic.h"
#include "cpu/error.h"

namespace pycoll::cpu {

namespace {

constexpr uint64_t kProtocol = 0x70796303;  // changes whenever a segment's layout or its use does
constexpr const char* kReachedAll = "0";    // else the kind of the error and its text

struct Hello {
  uint64_t protocol;
  char token[33];  // names the socket and proves that a sender has read the store
  int32_t world, cores;
  Config wishes;
};

struct Push {  // one message, together with two descriptors: segment and liveness page
  char token[33];
  int32_t sender;
};

// It as sendmsg and recvmsg take it, with room for the descriptors.
struct Parcel {
  Push message{};
  iovec data{&message, sizeof(message)};
  alignas(cmsghdr) char room[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr header{};

  Parcel() {
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = room;
    header.msg_controllen = sizeof(room);
  }
  Parcel(const Parcel&) = delete;
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

sockaddr_un address_of(const char* token, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = std::string("pycoll-") + token;  // abstract: sun_path begins with a zero byte
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
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
    const std::vector<Hello> hellos = read_hellos();
    auto result = std::make_shared<Attachment>();
    std::string said = kReachedAll;
    std::exception_ptr failure;
    try {
      settle(hellos, *result);
      push_to_all(hellos);
    } catch (const Error& e) {
      failure = std::current_exception();
      said = static_cast<char>('0' + static_cast<int>(e.kind)) + std::string(e.what());
    }
    store_.set(key("reached", rank_), said);
    if (failure) std::rethrow_exception(failure);
    try {
      hear_others();
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
    const std::string token = random_token();
    std::memcpy(mine_.token, token.c_str(), sizeof(mine_.token));
    listener_ = Fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    socklen_t length = 0;
    const sockaddr_un address = address_of(mine_.token, length);
    if (!listener_ || bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
        listen(listener_.get(), world_) != 0) {
      throw_errno("opening a local socket failed");
    }
    mine_.protocol = kProtocol;
    mine_.world = world_;
    mine_.cores = available_cores();
    mine_.wishes = config_;
    if (mine_.wishes.channels == 0) mine_.wishes.channels = std::clamp(mine_.cores / world_, 1, 4);
    store_.set(key("hello", rank_), to_bytes(mine_));
  }

  // Every value of `what`, as soon as all ranks have set theirs.
  std::vector<std::string> await_all(const char* what) {
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
                     "create this communicator? Raise `timeout` if they are slow",
                 ranks.front());
  }

  std::vector<Hello> read_hellos() {
    std::vector<Hello> hellos;
    for (const std::string& bytes : await_all("hello")) {
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
    Config c = hellos[0].wishes;
    a.cores = hellos[0].cores;
    for (const Hello& h : hellos) {
      c.channels = std::min(c.channels, h.wishes.channels);
      c.link_slots = std::min(c.link_slots, h.wishes.link_slots);
      c.slot_bytes = std::min(c.slot_bytes, h.wishes.slot_bytes);
      c.link_bytes = std::min(c.link_bytes, h.wishes.link_bytes);
      c.heap_bytes = std::min(c.heap_bytes, h.wishes.heap_bytes);
      c.one_shot_max_bytes = std::min(c.one_shot_max_bytes, h.wishes.one_shot_max_bytes);
      c.channel_min_bytes = std::min(c.channel_min_bytes, h.wishes.channel_min_bytes);
      a.cores = std::min(a.cores, h.cores);
    }
    a.rank = rank_;
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
    a.keeper = Keeper::get();
    segment_ = create_shared_memory("pycoll-segment", a.geometry.segment_bytes());
    a.segments.resize(world_);
    a.segments[rank_] = Mapping(segment_.get(), a.geometry.segment_bytes());
    prefault(a.segments[rank_].data(), a.geometry.scratch_bytes());
    liveness_fd_ = a.keeper->page_fd();
  }

  void push_to_all(const std::vector<Hello>& hellos) {
    std::vector<int> unreached;
    for (int r = 0; r < world_; ++r) {
      if (r != rank_ && !push(hellos[r].token)) unreached.push_back(r);
    }
    if (unreached.empty()) return;
    throw Error(ErrorKind::kUnsupported,
                "pycoll: rank " + std::to_string(rank_) + " shares no memory with " + list(unreached) +
                    ": all ranks must run on one machine, in one network namespace and as one user",
                unreached.front());
  }

  bool push(const char* token) {
    const Fd s(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!s) throw_errno("opening a local socket failed");
    // A full queue makes connect wait for the listener; it must not do so for ever.
    const timeval patience{
        std::max<long>(1, std::chrono::duration_cast<std::chrono::seconds>(deadline_ - Clock::now()).count()), 0};
    setsockopt(s.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    socklen_t length = 0;
    const sockaddr_un address = address_of(token, length);
    if (connect(s.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) return false;
    Parcel parcel;
    std::memcpy(parcel.message.token, token, sizeof(parcel.message.token));
    parcel.message.sender = rank_;
    cmsghdr* rights = CMSG_FIRSTHDR(&parcel.header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(2 * sizeof(int));
    const int fds[2] = {segment_.get(), liveness_fd_};
    std::memcpy(CMSG_DATA(rights), fds, sizeof(fds));
    return sendmsg(s.get(), &parcel.header, MSG_NOSIGNAL) == sizeof(Push);
  }

  void hear_others() {
    const std::vector<std::string> said = await_all("reached");
    for (int r = 0; r < world_; ++r) {
      if (said[r] != kReachedAll) throw Error(static_cast<ErrorKind>(said[r].at(0) - '0'), said[r].substr(1), r);
    }
  }

  // All peers have said that their pushes lie in this rank's socket.
  void take_in(Attachment& a) {
    a.liveness.resize(world_);
    for (int missing = world_ - 1; missing > 0;) {
      pollfd p{listener_.get(), POLLIN, 0};
      poll(&p, 1, 20);
      const Fd s(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (s) {
        missing -= take_one(s, a);
      } else if (Clock::now() > deadline_) {
        throw Error(ErrorKind::kTimeout, "pycoll: a peer's segment did not arrive in time");
      } else {
        interrupt_();
      }
    }
    for (const Mapping& m : a.segments) a.base.push_back(m.data());
  }

  int take_one(const Fd& s, Attachment& a) {
    ucred credentials{};
    socklen_t length = sizeof(credentials);
    const timeval patience{1, 0};
    setsockopt(s.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    getsockopt(s.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length);
    if (credentials.uid != geteuid()) return 0;
    Parcel parcel;
    const ssize_t got = recvmsg(s.get(), &parcel.header, MSG_CMSG_CLOEXEC);
    const cmsghdr* rights = got > 0 ? CMSG_FIRSTHDR(&parcel.header) : nullptr;
    if (rights == nullptr || rights->cmsg_type != SCM_RIGHTS || rights->cmsg_len != CMSG_LEN(2 * sizeof(int))) return 0;
    int fds[2];
    std::memcpy(fds, CMSG_DATA(rights), sizeof(fds));
    const Fd segment(fds[0]), liveness(fds[1]);
    const int r = parcel.message.sender;
    const bool expected = got == sizeof(Push) &&
                          std::memcmp(parcel.message.token, mine_.token, sizeof(mine_.token)) == 0 && r >= 0 &&
                          r < world_ && r != rank_ && a.segments[r].data() == nullptr;
    if (!expected) return 0;
    a.segments[r] = Mapping(segment.get(), a.geometry.segment_bytes());
    prefault(a.segments[r].data(), a.geometry.scratch_bytes());
    a.liveness[r] = PeerLiveness(liveness);
    return 1;
  }

  Store& store_;
  const int rank_, world_;
  const Config& config_;
  const Clock::time_point deadline_;
  const std::function<void()>& interrupt_;
  std::string prefix_;
  Hello mine_{};
  Fd listener_, segment_;
  int liveness_fd_ = -1;
};

}  // namespace

std::shared_ptr<Attachment> attach(Store& store, int rank, int world, const Config& config, Clock::time_point deadline,
                                   const std::function<void()>& interrupt) {
  Attach attaching(store, rank, world, config, deadline, interrupt);
  return attaching.run();
}

}  // namespace pycoll::cpu
