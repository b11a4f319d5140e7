// Send and receive over ranks that are threads: random traffic of all sizes, tags and kinds of memory, checked byte by
// byte; order, any source, beside collectives. What goes wrong is in mail_failure_test.cpp.
#include <algorithm>
#include <cstring>
#include <deque>
#include <filesystem>
#include <random>

#include "check.h"
#include "fake_mover.h"
#include "ranks.h"

using namespace pycoll;
using namespace pycoll::cpu;

namespace {

constexpr Milliseconds kLong{60000};
using Bytes = std::vector<unsigned char>;

void no_errors(const std::vector<std::string>& errors) {
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

// What rank `from` sends rank `to` as its message number `n` of this tag.
Bytes contents(int from, int to, int tag, int n, size_t bytes) {
  std::mt19937 random(static_cast<unsigned>(((from * 8 + to) * 64 + tag) * 1009 + n));
  Bytes b(bytes);
  for (unsigned char& x : b) x = static_cast<unsigned char>(random());
  return b;
}

// ---- random traffic ----

struct Parcel {
  bool sends;
  int peer;  // of a receive from any source: no matter which
  int tag, n;
  size_t bytes;
  bool any;
};

constexpr size_t kSizes[] = {0,   1,           37,       Envelope::kRoom,     Envelope::kRoom + 1,
                             512, 5 * 512 + 3, 40 * 512, Envelope::kRoom + 7, 9000};
constexpr int kThreads = 3, kTags = 4, kParcels = 12, kAnyTag = 50, kFromAny = 3;

// What thread `thread` of a rank sends and receives. Its tags are its own, so order among threads does not matter.
std::vector<Parcel> parcels_of(int rank, int world, int thread, int seed) {
  std::vector<Parcel> all;
  for (int from = 0; from < world; ++from) {
    for (int to = 0; to < world; ++to) {
      if (from == to || (from != rank && to != rank)) continue;
      std::mt19937 random(static_cast<unsigned>(((seed * 8 + from) * 8 + to) * 8 + thread));
      std::vector<int> sent(kTags, 0);
      for (int i = 0; i < kParcels; ++i) {
        const int tag = static_cast<int>(random() % kTags);
        const size_t bytes = kSizes[random() % std::size(kSizes)];
        all.push_back({from == rank, from == rank ? to : from, thread * kTags + tag, sent[tag]++, bytes, false});
      }
      for (int i = 0; i < kFromAny; ++i) {
        const size_t bytes = thread == 0 ? 50 : 6000;
        all.push_back({from == rank, from == rank ? to : from, kAnyTag + thread, i, bytes, from != rank});
      }
    }
  }
  return all;
}

// In random order, but for what has the same peer and tag.
void shuffle(std::vector<Parcel>& parcels, std::mt19937& random) {
  std::shuffle(parcels.begin(), parcels.end(), random);
  std::vector<Parcel> ordered = parcels;
  std::stable_sort(ordered.begin(), ordered.end(), [](const Parcel& a, const Parcel& b) { return a.n < b.n; });
  for (Parcel& p : parcels) {
    const auto next = std::find_if(ordered.begin(), ordered.end(), [&p](const Parcel& o) {
      return o.sends == p.sends && o.peer == p.peer && o.tag == p.tag;
    });
    p = *next;
    ordered.erase(next);
  }
}

struct Running {
  Parcel parcel;
  Bytes memory;
  std::unique_ptr<FakeMover> mover;
  Request request;
  std::shared_ptr<std::atomic<int>> done;  // calls of the callback; none: not asynchronous
};

void start(Communicator& comm, Running& r, std::mt19937& random) {
  const Parcel& p = r.parcel;
  r.memory = p.sends ? contents(comm.rank(), p.peer, p.tag, p.n, p.bytes) : Bytes(p.bytes);
  if (random() % 4 == 0) r.mover = std::make_unique<FakeMover>(static_cast<int>(random() % 20));
  const Message m{.data = r.memory.data(),
                  .bytes = p.bytes,
                  .kind = static_cast<uint64_t>(p.tag),
                  .peer = p.any ? kAnySource : p.peer,
                  .tag = p.tag,
                  .mover = r.mover.get()};
  Mail::Done done;
  if (random() % 2 == 0) {
    r.done = std::make_shared<std::atomic<int>>(0);
    done = [called = r.done](std::exception_ptr failure) {
      CHECK(!failure);
      ++*called;
    };
  }
  r.request = p.sends ? comm.mail().send(m, std::move(done)) : comm.mail().receive(m, std::move(done));
}

// Every message from any source must have come once.
void check_from_any(const Communicator& comm, const std::vector<Running>& running) {
  std::vector<std::vector<int>> seen(comm.world(), std::vector<int>(kFromAny, 0));
  for (const Running& r : running) {
    if (!r.parcel.any) continue;
    const int source = r.request.source();
    for (int n = 0; n < kFromAny; ++n) {
      seen[source][n] += r.memory == contents(source, comm.rank(), r.parcel.tag, n, r.parcel.bytes);
    }
  }
  for (int s = 0; s < comm.world(); ++s) {
    for (const int times : seen[s]) CHECK_EQ(times, s == comm.rank() ? 0 : 1);
  }
}

void traffic_of_a_thread(Communicator& comm, int thread, int seed) {
  std::mt19937 random(static_cast<unsigned>(seed * 100 + comm.rank() * 10 + thread));
  std::vector<Parcel> parcels = parcels_of(comm.rank(), comm.world(), thread, seed);
  shuffle(parcels, random);
  std::vector<Running> running(parcels.size());
  for (size_t i = 0; i < parcels.size(); ++i) {
    running[i].parcel = parcels[i];
    start(comm, running[i], random);
    if (random() % 8 == 0) (void)running[random() % (i + 1)].request.ended();
    if (random() % 32 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1500));  // others sleep
  }
  std::shuffle(running.begin(), running.end(), random);
  for (Running& r : running) {
    const Parcel& p = r.parcel;
    r.request.wait();
    CHECK(r.request.ended());
    CHECK(p.any || r.request.source() == p.peer);
    if (!p.sends && !p.any) CHECK(r.memory == contents(p.peer, comm.rank(), p.tag, p.n, p.bytes));
    while (r.done && *r.done == 0) std::this_thread::yield();
    if (r.done) CHECK_EQ(r.done->load(), 1);
  }
  check_from_any(comm, running);
}

void random_traffic() {
  for (const int world : {2, 3, 4, 7}) {
    for (int seed = 0; seed < 3; ++seed) {
      no_errors(run_ranks(world, small_config(), kLong, [&](Communicator& comm) {
        std::vector<std::thread> threads;
        for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { traffic_of_a_thread(comm, t, seed); });
        std::thread collectives([&] {
          std::vector<int32_t> x(2000, 1);
          for (int i = 0; i < 20; ++i) {
            comm.run({.collective = Collective::kAllReduce,
                      .dtype = DType::kInt32,
                      .op = ReduceOp::kMax,
                      .in = x.data(),
                      .out = x.data(),
                      .count = x.size()});
          }
          CHECK_EQ(x[1999], 1);
        });
        for (std::thread& t : threads) t.join();
        collectives.join();
      }));
    }
  }
}

// ---- one thing at a time ----

void send(Communicator& comm, int to, int tag, Bytes b) {
  comm.mail().send({.data = b.data(), .bytes = b.size(), .peer = to, .tag = tag}).wait();
}
Bytes receive(Communicator& comm, int from, int tag, size_t bytes) {
  Bytes b(bytes);
  comm.mail().receive({.data = b.data(), .bytes = bytes, .peer = from, .tag = tag}).wait();
  return b;
}

void ping_pong() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    for (int i = 0; i < 300; ++i) {
      const size_t bytes = kSizes[i % std::size(kSizes)];
      if (comm.rank() == 0) send(comm, 1, i, contents(0, 1, 0, i, bytes));
      CHECK(receive(comm, 1 - comm.rank(), i, bytes) == contents(1 - comm.rank(), comm.rank(), 0, i, bytes));
      if (comm.rank() == 1) send(comm, 0, i, contents(1, 0, 0, i, bytes));
    }
  }));
}

void mutual_large_sends() {
  for (const int world : {2, 5}) {
    no_errors(run_ranks(world, small_config(), kLong, [](Communicator& comm) {
      const int world = comm.world(), next = (comm.rank() + 1) % world, before = (comm.rank() + world - 1) % world;
      Bytes out = contents(comm.rank(), next, 0, 0, 100000);
      const Request sent = comm.mail().send({.data = out.data(), .bytes = out.size(), .peer = next});
      CHECK(receive(comm, before, 0, 100000) == contents(before, comm.rank(), 0, 0, 100000));
      sent.wait();
    }));
  }
}

// More than there are envelopes, and all but the last lie aside.
void tags_in_reverse() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    constexpr int kMessages = 40;
    const size_t before = comm.footprint();
    for (int i = 0; comm.rank() == 0 && i < kMessages; ++i) send(comm, 1, i, contents(0, 1, i, 0, 1000 + i));
    for (int i = kMessages - 1; comm.rank() == 1 && i >= 0; --i) {
      CHECK(receive(comm, 0, i, 1000 + i) == contents(0, 1, i, 0, 1000 + i));
      if (i == kMessages - 1) CHECK(comm.footprint() >= before + 39 * 1000);
    }
    CHECK(comm.footprint() < before + (size_t{256} << 10));  // nothing lies aside any more; the lanes have been used
  }));
}

// Of one source and tag, received by name and from any source in turns.
void order_is_kept() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    constexpr int kMessages = 60;
    for (int i = 0; comm.rank() == 0 && i < kMessages; ++i) send(comm, 1, 3, contents(0, 1, 3, i, i % 3 ? 100 : 5000));
    for (int i = 0; comm.rank() == 1 && i < kMessages; ++i) {
      const size_t bytes = i % 3 ? 100 : 5000;
      CHECK(receive(comm, i % 2 ? 0 : kAnySource, 3, bytes) == contents(0, 1, 3, i, bytes));
    }
  }));
}

// All have messages waiting for rank 0, which receives as many from each before it receives from one again.
void any_source_is_fair() {
  no_errors(run_ranks(4, small_config(), kLong, [](Communicator& comm) {
    constexpr int kMessages = 10;
    for (int i = 0; comm.rank() != 0 && i < kMessages; ++i) send(comm, 0, 0, Bytes(8));
    comm.run({.collective = Collective::kBarrier});
    std::vector<int> received(4, 0);
    for (int i = 0; comm.rank() == 0 && i < 3 * kMessages; ++i) {
      Bytes b(8);
      const Request r = comm.mail().receive({.data = b.data(), .bytes = 8});
      r.wait();
      CHECK_EQ(received[r.source()]++, i / 3);
    }
  }));
}

// A GPU that has not come to a message, at either end, delays no other message of the lane, be it in memory or not.
void who_waits_for_a_gpu_delays_nobody() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    const int other = 1 - comm.rank();
    constexpr int kWaiting = 12;  // more than a lane grants at once
    std::deque<FakeMover> movers;
    std::vector<Bytes> memory(kWaiting);
    std::vector<Request> requests;
    for (int i = 0; i < kWaiting; ++i) {
      const bool sends = i % 2 == comm.rank();
      memory[i] = sends ? contents(comm.rank(), other, i, 0, 9000) : Bytes(9000);
      const bool waits = i % 3 != 0 || sends;
      Message m{.data = memory[i].data(), .bytes = 9000, .peer = other, .tag = i, .mover = nullptr};
      if (waits) m.mover = &movers.emplace_back(1 << 30);
      requests.push_back(sends ? comm.mail().send(m) : comm.mail().receive(m));
    }
    for (const size_t bytes : {size_t{10}, size_t{90000}}) {
      Bytes out = contents(comm.rank(), other, 99, 0, bytes);
      const Request r = comm.mail().send({.data = out.data(), .bytes = bytes, .peer = other, .tag = 99});
      CHECK(receive(comm, other, 99, bytes) == contents(other, comm.rank(), 99, 0, bytes));
      r.wait();
    }
    comm.run({.collective = Collective::kBarrier});
    for (FakeMover& m : movers) m.come();
    for (int i = 0; i < kWaiting; ++i) {
      requests[i].wait();
      if (i % 2 != comm.rank()) CHECK(memory[i] == contents(other, comm.rank(), i, 0, 9000));
    }
  }));
}

Call all_reduce(std::vector<float>& x) {
  return {.collective = Collective::kAllReduce,
          .dtype = DType::kFloat32,
          .in = x.data(),
          .out = x.data(),
          .count = x.size()};
}

// A large message whose receiver is in a collective that needs the sender, and the other way round.
void beside_collectives() {
  for (int order = 0; order < 4; ++order) {
    no_errors(run_ranks(3, small_config(), kLong, [order](Communicator& comm) {
      std::vector<float> x(3000, 1.0f);
      Bytes b = comm.rank() == 0 ? contents(0, 1, 0, 0, 50000) : Bytes(50000);
      std::atomic<int> done{0};
      const auto begin = [&] {
        const auto count = [&](std::exception_ptr failure) { done += failure ? 100 : 1; };
        Message m{.data = b.data(), .bytes = b.size(), .peer = 1 - comm.rank()};
        return comm.rank() == 0 ? comm.mail().send(m, count) : comm.mail().receive(m, count);
      };
      Request r;
      const bool first = ((order >> comm.rank()) & 1) != 0;
      if (comm.rank() < 2 && first) r = begin();
      comm.run(all_reduce(x));
      if (comm.rank() < 2 && !first) r = begin();
      if (r) r.wait();
      while (r && done == 0) std::this_thread::yield();
      CHECK(comm.rank() != 1 || b == contents(0, 1, 0, 0, 50000));
      CHECK_EQ(x[0], 3.0f);
    }));
  }
}

// Nobody waits: the postmen do it all, and each callback starts the next message. It may not make a collective.
class Relay {
 public:
  explicit Relay(Communicator& comm) : comm_(comm) { go_on(); }
  void await(int hops) const {
    while (ended_ < hops) std::this_thread::yield();
  }

 private:
  void go_on() {
    const int hop = hop_++;
    const bool sends = (hop + comm_.rank()) % 2 == 0;
    if (sends) std::fill(memory_.begin(), memory_.end(), static_cast<unsigned char>(hop));
    const Message m{.data = memory_.data(), .bytes = memory_.size(), .peer = 1 - comm_.rank()};
    const auto done = [this, hop](std::exception_ptr failure) {
      CHECK(!failure);
      CHECK_EQ(static_cast<int>(memory_[0]), hop);
      try {
        comm_.run({.collective = Collective::kBarrier});
        CHECK(false);
      } catch (const Error& e) {
        CHECK(e.kind == ErrorKind::kUsage);
      }
      if (hop < kHops) go_on();
      ++ended_;
    };
    sends ? comm_.mail().send(m, done) : comm_.mail().receive(m, done);
  }

  Communicator& comm_;
  Bytes memory_ = Bytes(9000);
  int hop_ = 0;
  std::atomic<int> ended_{0};

 public:
  static constexpr int kHops = 30;
};

void callbacks_may_go_on() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    if (comm.rank() == 1) std::this_thread::sleep_for(Milliseconds(5));  // rank 0's first does not end in its caller
    Relay relay(comm);
    relay.await(Relay::kHops + 1);
  }));
}

// A callback drops the last reference to the communicator.
void a_callback_may_destroy_the_communicator() {
  MapStore store;
  std::vector<std::thread> threads;
  std::atomic<int> done{0};
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      auto comm = std::make_shared<Communicator>(store, r, 2, small_config(), kLong);
      Communicator& c = *comm;
      auto b = std::make_shared<Bytes>(9000);
      const Message m{.data = b->data(), .bytes = b->size(), .peer = 1 - r};
      Mail::Done last = [b, &done, comm = std::move(comm)](std::exception_ptr failure) mutable {
        CHECK(!failure);
        comm = nullptr;
        ++done;
      };
      r == 0 ? c.mail().send(m, std::move(last)) : c.mail().receive(m, std::move(last));
    });
  }
  for (std::thread& t : threads) t.join();
  while (done < 2) std::this_thread::yield();
}

int threads_here() {
  int n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) ++n;
  return n;
}

// Many communicators cost nothing until they send: no thread, no memory.
void what_is_not_used_costs_nothing() {
  const int before = threads_here();
  std::vector<std::unique_ptr<Communicator>> comms(2);
  MapStore store;
  std::thread other([&] { comms[1] = std::make_unique<Communicator>(store, 1, 2, small_config(), kLong); });
  comms[0] = std::make_unique<Communicator>(store, 0, 2, small_config(), kLong);
  other.join();
  const int keeper = threads_here() - before;
  const size_t scratch = comms[0]->footprint();
  CHECK_EQ(scratch, comms[0]->geometry().scratch_bytes());
  std::thread sender([&] { send(*comms[1], 0, 0, Bytes(10)); });
  CHECK(receive(*comms[0], 1, 0, 10) == Bytes(10));
  sender.join();
  CHECK(comms[0]->footprint() > scratch && comms[0]->footprint() < scratch + (size_t{4} << 20));
  CHECK_EQ(threads_here(), before + keeper);
  Bytes b(10);
  const Request r = comms[0]->mail().receive({.data = b.data(), .bytes = 10, .peer = 1}, [](std::exception_ptr) {});
  CHECK_EQ(threads_here(), before + keeper + 1);
  send(*comms[1], 0, 0, Bytes(10));
  r.wait();
  comms.clear();
}

}  // namespace

int main() {
  what_is_not_used_costs_nothing();  // it counts threads: first
  ping_pong();
  mutual_large_sends();
  tags_in_reverse();
  order_is_kept();
  any_source_is_fair();
  who_waits_for_a_gpu_delays_nobody();
  beside_collectives();
  callbacks_may_go_on();
  a_callback_may_destroy_the_communicator();

  random_traffic();
  return check::report();
}
