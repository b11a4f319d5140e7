// What goes wrong with messages, and what each rank is then told: mismatches, time-outs, ranks that leave, fail or are
// killed half-way, interrupts, and the end of a communicator with messages under way.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "check.h"
#include "cpu/wait.h"
#include "fake_mover.h"
#include "ranks.h"

using namespace pycoll;
using namespace pycoll::cpu;

namespace {

constexpr Milliseconds kLong{60000}, kShort{300};
constexpr size_t kLarge = 100000;  // many rounds of the pipe
using Bytes = std::vector<unsigned char>;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Message message(Bytes& b, int peer, int tag = 0) {
  return {.data = b.data(), .bytes = b.size(), .peer = peer, .tag = tag};
}
void send(Communicator& comm, int to, size_t bytes, int tag = 0) {
  Bytes b(bytes, static_cast<unsigned char>(tag + 1));
  comm.mail().send(message(b, to, tag)).wait();
}
void receive(Communicator& comm, int from, size_t bytes, int tag = 0) {
  Bytes b(bytes);
  comm.mail().receive(message(b, from, tag)).wait();
  CHECK(b == Bytes(bytes, static_cast<unsigned char>(tag + 1)));
}

// The error that `f` raises.
template <class F>
Error outcome(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    return e;
  }
  return Error(ErrorKind{}, "no error");
}

template <class F>
void expect(ErrorKind kind, const std::string& text, int rank, const F& f) {
  const Error e = outcome(f);
  CHECK(e.kind == kind);
  CHECK_EQ(e.rank, rank);
  if (!contains(e.what(), text)) CHECK_EQ(std::string(e.what()), text);
}

// What an asynchronous request was told.
struct Told {
  std::atomic<bool> done{false};
  std::exception_ptr failure;

  Mail::Done listener() {
    return [this](std::exception_ptr f) {
      CHECK(!done);
      failure = f;
      done = true;
    };
  }
  std::string await() {
    while (!done) std::this_thread::yield();
    return outcome([&] {
             if (failure) std::rethrow_exception(failure);
           })
        .what();
  }
};

bool has_left(Communicator& comm, int rank) { return (comm.monitor().ranks_that_left() >> rank & 1) != 0; }

void no_errors(const std::vector<std::string>& errors) {
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

// ---- one rank alone ----

void bad_arguments_harm_nothing() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    Bytes b(10);
    for (const int peer : {comm.rank(), 2, -2, kAnySource}) {
      expect(ErrorKind::kUsage, "pycoll: send:", -1, [&] { comm.mail().send(message(b, peer)); });
    }
    for (const int peer : {comm.rank(), 2, -2}) {
      expect(ErrorKind::kUsage, "pycoll: receive:", -1, [&] { comm.mail().receive(message(b, peer)); });
    }
    expect(ErrorKind::kUsage, "tag -1", -1, [&] { comm.mail().send(message(b, 1 - comm.rank(), -1)); });
    if (comm.rank() == 0) send(comm, 1, 10);
    if (comm.rank() == 1) receive(comm, 0, 10);
  }));
  no_errors(run_ranks(1, small_config(), kLong, [](Communicator& comm) {
    Bytes b(10);
    expect(ErrorKind::kUsage, "world of 1", -1, [&] { comm.mail().receive(message(b, kAnySource)); });
  }));
}

// ---- both ranks must mean the same ----

void mismatches() {
  for (const size_t bytes : {size_t{10}, kLarge}) {
    for (const bool kind : {false, true}) {
      for (const bool aside : {false, true}) {
        no_errors(run_ranks(3, small_config(), kLong, [=](Communicator& comm) {
          const std::string text = kind ? "of another element type" : "which sent " + std::to_string(bytes) + " bytes";
          Bytes b(bytes + (comm.rank() == 1 && !kind));
          Message m = message(b, 1 - comm.rank(), 7);
          m.kind = comm.rank() == 1 && kind;
          const auto call = [&] {
            if (comm.rank() == 0) {
              const Request r = comm.mail().send(m);
              if (aside) send(comm, 1, 10, 8);
              r.wait();
              receive(comm, 1, 10);  // a small message has ended for its sender: it learns of it later
            } else if (comm.rank() == 1) {
              if (aside) receive(comm, 0, 10, 8);
              comm.mail().receive(m).wait();
            } else {
              receive(comm, 0, 10);
            }
          };
          for (int i = 0; i < 2; ++i) expect(ErrorKind::kMismatch, text, -1, call);  // terminal
        }));
      }
    }
  }
}

// ---- time-outs ----

void who_holds_up_all_is_named() {
  std::atomic<int> waiting{0};
  std::atomic<bool> receives{false};  // before rank 0 begins to wait, which may take long on a busy machine
  no_errors(run_ranks(3, small_config(), kShort, [&](Communicator& comm) {
    if (comm.rank() == 2) {
      while (waiting < 2) std::this_thread::yield();
      return;
    }
    const Error e = outcome([&] {
      if (comm.rank() == 0) {
        while (!receives) std::this_thread::yield();
        send(comm, 1, kLarge, 4);
      } else {
        Bytes b(10);
        const Request r = comm.mail().receive(message(b, 2));
        receives = true;
        r.wait();
      }
    });
    ++waiting;
    CHECK(e.kind == ErrorKind::kTimeout);
    CHECK_EQ(e.rank, 2);
    const bool by_zero = contains(e.what(), "rank 0 waited");  // who was late first tells the other
    CHECK(contains(e.what(), by_zero ? "in send(to rank 1, tag 4)" : "in receive(from rank 2, tag 0)"));
    expect(ErrorKind::kTimeout, "rank 2", 2, [&] { send(comm, 1 - comm.rank(), 1); });
  }));
}

void nobody_is_blamed_for_who_waits_for_any_rank() {
  std::atomic<bool> receives{false}, told{false};
  no_errors(run_ranks(3, small_config(), Milliseconds(1000), [&](Communicator& comm) {
    if (comm.rank() == 2) {
      while (!told) std::this_thread::yield();
    } else if (comm.rank() == 1) {
      comm.set_timeout(kLong);
      Bytes b(10);
      const Request r = comm.mail().receive(message(b, kAnySource));
      receives = true;
      expect(ErrorKind::kTimeout, "rank 0 waited", -1, [&] { r.wait(); });
    } else {
      while (!receives) std::this_thread::yield();
      expect(ErrorKind::kTimeout, "for rank 1, which waits to receive from any rank: none came", -1,
             [&] { send(comm, 1, kLarge, 4); });
      told = true;
    }
  }));
}

void a_shorter_wait_leaves_the_request_as_it_is() {
  std::atomic<int> waited{0};
  no_errors(run_ranks(2, small_config(), kLong, [&](Communicator& comm) {
    for (int i = 0; i < 2; ++i) {
      if (comm.rank() == 0) {
        while (waited == i) std::this_thread::yield();
        send(comm, 1, kLarge);
        continue;
      }
      Bytes b(kLarge);
      Told told;
      const Request r =
          i == 0 ? comm.mail().receive(message(b, kAnySource), told.listener()) : comm.mail().receive(message(b, 0));
      for (const int ms : {0, 1, 30}) {
        expect(ErrorKind::kTimeout, "in receive(from ", i - 1, [&] { r.wait(Milliseconds(ms)); });
        CHECK(!r.ended());
      }
      ++waited;
      r.wait(2 * kLong);
      if (i == 0) CHECK_EQ(told.await(), std::string("no error"));
      CHECK(b == Bytes(kLarge, 1));
    }
  }));
}

// ---- ranks that leave ----

void what_a_rank_sent_before_it_left_still_counts() {
  no_errors(run_ranks(3, small_config(), kLong, [](Communicator& comm) {
    const size_t pipe = Mailbox::kBuffers * comm.geometry().mail_bytes;  // all of a large message
    CHECK(pipe > Envelope::kRoom);
    if (comm.rank() == 2) return;
    if (comm.rank() == 1) {
      for (int tag = 0; tag < 5; ++tag) send(comm, 0, 100, tag);
      return send(comm, 0, pipe, 9);
    }
    Bytes b(pipe);
    SlowMover gpu(Milliseconds(3));  // it takes longer than to learn that the sender has left
    receive(comm, 1, 100, 4);
    Message m = message(b, 1, 9);
    m.mover = &gpu;
    const Request r = comm.mail().receive(m);
    while (!has_left(comm, 1) || !has_left(comm, 2)) (void)r.ended();
    r.wait();
    CHECK(b == Bytes(pipe, 10));
    for (int tag = 3; tag >= 0; --tag) receive(comm, tag % 2 ? 1 : kAnySource, 100, tag);
    expect(ErrorKind::kPeerLost, "has left", 1, [&] { receive(comm, 1, 100, 0); });
    expect(ErrorKind::kPeerLost, "has left", 1, [&] { send(comm, 2, 100, 0); });
  }));
}

void who_waits_for_a_rank_that_leaves_is_told() {
  for (int how = 0; how < 4; ++how) {
    no_errors(run_ranks(3, small_config(), kLong, [how](Communicator& comm) {
      if (comm.rank() == 1) return;
      if (comm.rank() == 2) {  // a receive from any source waits for all
        if (how == 1) std::this_thread::sleep_for(Milliseconds(50));
        return;
      }
      Told told;
      Bytes b(kLarge);
      if (how == 0) expect(ErrorKind::kPeerLost, "rank 1 has left", 1, [&] { receive(comm, 1, 10); });
      if (how == 1) {
        const Error e = outcome([&] { receive(comm, kAnySource, 10); });
        CHECK(e.kind == ErrorKind::kPeerLost);
        CHECK(contains(e.what(), "has left"));
      }
      if (how == 2) expect(ErrorKind::kPeerLost, "rank 1 has left", 1, [&] { send(comm, 1, kLarge); });
      if (how == 3) {  // nobody waits but the postman
        const Error e = outcome([&] {
          comm.mail().send(message(b, 1), told.listener());
          CHECK(contains(told.await(), "rank 1 has left"));
        });
        CHECK(contains(e.what(), "no error") || contains(e.what(), "rank 1 has left"));
      }
    }));
  }
}

// The others have left long ago; the last one sends and leaves while this rank finds out about them.
void what_the_last_to_leave_has_sent_is_received() {
  constexpr int kWorld = 8;
  for (int i = 0; i < 100; ++i) {
    no_errors(run_ranks(kWorld, small_config(), kLong, [i](Communicator& comm) {
      if (comm.rank() == 0) return receive(comm, kAnySource, 10);
      if (comm.rank() < kWorld - 1) return;
      for (int r = 1; r < kWorld - 1; ++r) {
        while (!has_left(comm, r)) std::this_thread::yield();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(i * 211 % 20000));  // a rank that waits looks every 20 ms
      send(comm, 0, 10);
    }));
  }
}

// It is in the nature of a text that somebody else writes it.
void an_error_is_cut_between_characters() {
  size_t bytes = 0;
  for (const char* begin : {"a", "ab"}) {
    const auto errors = run_ranks(2, small_config(), kLong, [begin](Communicator& comm) {
      std::string text = begin;
      for (int i = 0; i < 600; ++i) text += "\u00fc";
      if (comm.rank() == 1) comm.abort(text);
      receive(comm, kAnySource, 10);
    });
    bytes += errors[0].size();
    CHECK_EQ(errors[0].substr(errors[0].size() - 4), std::string("\u00fc\u00fc"));
  }
  CHECK_EQ(bytes, size_t{1022 + 1023});
}

// ---- ranks that fail ----

// A GPU that has nothing left to move in a message's memory when that is given back.
struct Checked {
  explicit Checked(bool slow) : mover(slow ? new SlowMover(std::chrono::microseconds(100)) : nullptr) {}
  ~Checked() { CHECK(!mover || mover->done()); }
  std::unique_ptr<Mover> mover;
};

// All threads of rank 0 wait, spinning, asleep or in the middle of a message, when rank 1 gives up. What they get back
// they free at once, while others may still make steps.
void an_abort_ends_every_wait() {
  for (int i = 0; i < 10; ++i) {
    const auto errors = run_ranks(2, small_config(), kLong, [i](Communicator& comm) {
      std::vector<std::thread> threads;
      for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
          const Error e = outcome([&] {
            for (int n = 0;; ++n) {
              auto b = std::make_unique<Bytes>(kLarge);
              const Checked gpu(t == 1);
              Message m = message(*b, 1 - comm.rank(), t);
              m.mover = gpu.mover.get();
              Told told;
              const bool sends = (comm.rank() + t) % 2 == 0;
              const auto done = n % 2 ? told.listener() : nullptr;
              const Request r = sends ? comm.mail().send(m, done) : comm.mail().receive(m, done);
              if (n % 2) (void)told.await();
              r.wait();
              if (t == 3) receive(comm, 1 - comm.rank(), 10, 99);  // nobody sends it
            }
          });
          CHECK(contains(e.what(), "rank 1 gave up"));
        });
      }
      std::this_thread::sleep_for(Milliseconds(3 * i));
      if (comm.rank() == 1) comm.abort("rank 1 gave up");
      for (std::thread& t : threads) t.join();
      expect(ErrorKind::kError, "rank 1 gave up", 1, [&] { send(comm, 1 - comm.rank(), 1); });
    });
    no_errors(errors);
  }
}

// Also what lies there already.
void who_finds_that_a_rank_failed_and_left_receives_no_more() {
  std::atomic<bool> sent{false};
  no_errors(run_ranks(3, small_config(), kLong, [&](Communicator& comm) {
    if (comm.rank() == 2) {
      send(comm, 1, 10);
      sent = true;
    } else if (comm.rank() == 0) {
      while (!sent) std::this_thread::yield();
      comm.abort("rank 0 gave up");
    } else {
      while (!has_left(comm, 0)) std::this_thread::yield();
      expect(ErrorKind::kError, "rank 0 gave up", 0, [&] { send(comm, 0, 10); });
      expect(ErrorKind::kError, "rank 0 gave up", 0, [&] { receive(comm, 2, 10); });
    }
  }));
}

void a_failed_collective_ends_messages_too() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    Told told;
    Bytes b(kLarge);
    comm.mail().receive(message(b, 1 - comm.rank()), told.listener());
    std::vector<float> x(10 + comm.rank());
    const Error e = outcome([&] {
      comm.run({.collective = Collective::kAllReduce,
                .dtype = DType::kFloat32,
                .in = x.data(),
                .out = x.data(),
                .count = x.size()});
    });
    CHECK(e.kind == ErrorKind::kMismatch);
    CHECK_EQ(told.await(), std::string(e.what()));
  }));
}

// ---- interrupts ----

struct Interrupt {};
thread_local std::function<void()> handler;

void interrupts() {
  set_interrupt_check([] {
    if (handler) std::exchange(handler, nullptr)();
  });
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    if (comm.rank() == 1) {
      receive(comm, 0, 10, 1);
      std::this_thread::sleep_for(Milliseconds(50));
      send(comm, 0, 10);
      return expect(ErrorKind::kError, "rank 0 was interrupted in receive(from rank 1, tag 2)", 0,
                    [&] { receive(comm, 0, 10, 3); });
    }
    Bytes b(10);
    Told told;
    bool interrupted = false;
    const auto wait_interrupted = [&](const Request& r) {
      interrupted = false;
      handler = [] { throw Interrupt(); };
      try {
        r.wait();
      } catch (const Interrupt&) {
        interrupted = true;
      }
    };
    const Request r = comm.mail().receive(message(b, 1), told.listener());
    wait_interrupted(r);
    CHECK(interrupted);
    handler = [&] { send(comm, 1, 10, 1); };  // a handler may exchange messages, but make no collectives
    r.wait();
    CHECK_EQ(told.await(), std::string("no error"));
    Bytes never(10);
    wait_interrupted(comm.mail().receive(message(never, 1, 2)));
    CHECK(interrupted);
  }));
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    handler = [&] {
      expect(ErrorKind::kUsage, "from within another", -1, [&] { comm.run({.collective = Collective::kBarrier}); });
      comm.close();
    };
    const Error e = outcome([&] { receive(comm, 1 - comm.rank(), 10); });
    CHECK(contains(e.what(), "closed the communicator within"));
    handler = nullptr;
  }));
  set_interrupt_check(nullptr);
}

// ---- the end ----

void closing_ends_what_is_being_sent() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    constexpr int kSmall = 40;  // more than there are envelopes
    if (comm.rank() == 1) {
      std::this_thread::sleep_for(Milliseconds(20));
      receive(comm, 0, kLarge, 50);
      for (int i = 0; i < kSmall; ++i) receive(comm, 0, 100, i);
      return;
    }
    std::vector<Bytes> memory;
    std::vector<Told> told(kSmall + 1);
    for (int i = 0; i < kSmall; ++i) memory.emplace_back(100, i + 1);
    memory.emplace_back(kLarge, 51);
    comm.mail().send(message(memory[kSmall], 1, 50), told[kSmall].listener());
    for (int i = 0; i < kSmall; ++i) comm.mail().send(message(memory[i], 1, i), told[i].listener());
    comm.close();
    for (Told& t : told) CHECK_EQ(t.await(), std::string("no error"));
    expect(ErrorKind::kError, "closed", -1, [&] { send(comm, 1, 1); });
  }));
}

// Each would wait for the other to receive, or for its time-out.
void closing_does_not_wait_for_who_closes() {
  no_errors(run_ranks(2, small_config(), kLong, [](Communicator& comm) {
    Bytes b(kLarge), c(kLarge);
    Told sent, received;
    const Request r = comm.mail().send(message(b, 1 - comm.rank(), 1), sent.listener());
    comm.mail().receive(message(c, 1 - comm.rank(), 2), received.listener());
    comm.close();
    CHECK(contains(sent.await(), "has left"));
    const std::string end = received.await();
    CHECK(contains(end, "closed") || contains(end, "has left"));
    CHECK(r.ended());
    expect(ErrorKind::kPeerLost, "has left", 1 - comm.rank(), [&] { r.wait(); });
  }));
}

// While close() waits for a call that is queued, messages are refused like calls: nothing succeeds after an error.
void messages_are_refused_as_soon_as_calls() {
  constexpr int kNotYet = -1;
  std::atomic<int> calls{kNotYet};
  no_errors(run_ranks(2, small_config(), kLong, [&](Communicator& comm) {
    const Call barrier{.collective = Collective::kBarrier};
    if (comm.rank() == 1) {
      while (calls == kNotYet) std::this_thread::yield();
      for (int i = 0; i < calls; ++i) comm.run(barrier);
      return;
    }
    std::atomic<int> ended{0};
    int begun = 0;
    const auto call = [&] {
      comm.enqueue([&](const Communicator::Runner& run) { run(barrier); },
                   [&](std::exception_ptr failure) { ended += !failure; });
      ++begun;
    };
    call();
    std::thread closer([&] { comm.close(); });
    expect(ErrorKind::kError, "closed", -1, [&] {
      for (;;) call();
    });
    CHECK_EQ(ended.load(), 0);  // so the queue is still at its first call
    expect(ErrorKind::kError, "closed", -1, [&] { send(comm, 1, 1); });
    calls = begun;
    closer.join();
    CHECK_EQ(ended.load(), begun);
  }));
}

void closing_waits_no_longer_than_the_timeout() {
  std::atomic<bool> closed{false};
  no_errors(run_ranks(2, small_config(), kShort, [&](Communicator& comm) {
    if (comm.rank() == 1) {
      while (!closed) std::this_thread::yield();
      return;
    }
    Bytes b(kLarge);
    Told told;
    comm.mail().send(message(b, 1), told.listener());
    comm.close();
    closed = true;
    CHECK(contains(told.await(), "closed"));
  }));
}

void closing_beside_waits() {
  for (int i = 0; i < 20; ++i) {
    no_errors(run_ranks(2, small_config(), kLong, [i](Communicator& comm) {
      std::vector<std::thread> threads;
      for (int t = 0; comm.rank() == 0 && t < 3; ++t) {
        threads.emplace_back([&, t] {
          const Error e = outcome([&] {
            for (;;) {
              auto b = std::make_unique<Bytes>(t == 0 ? kLarge : 100);
              comm.mail().receive(message(*b, 1, t)).wait();
            }
          });
          CHECK(contains(e.what(), "closed") || contains(e.what(), "has left"));
        });
      }
      if (comm.rank() == 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(200 * i));
        comm.close();
      } else {
        const Error e = outcome([&] {
          for (;;) {
            send(comm, 0, 100, 1);
            send(comm, 0, kLarge, 0);
          }
        });
        CHECK(e.kind == ErrorKind::kPeerLost);
      }
      for (std::thread& t : threads) t.join();
    }));
  }
}

// ---- ranks that are killed: processes ----

// Through which processes meet that have forked from one.
class SharedStore : public Store {
 public:
  SharedStore() {
    void* p = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p != MAP_FAILED) table_ = new (p) Table;
  }
  ~SharedStore() override { munmap(table_, sizeof(Table)); }
  void set(const std::string& key, const std::string& value) override {
    Entry& e = table_->entries[table_->count.fetch_add(1)];
    std::snprintf(e.key, sizeof(e.key), "%s", key.c_str());
    std::memcpy(e.value, value.data(), value.size());
    e.bytes = value.size();
    e.here = true;
  }
  bool has(const std::string& key) override { return find(key) != nullptr; }
  std::string get(const std::string& key) override { return {find(key)->value, find(key)->bytes}; }
  int64_t add(const std::string&, int64_t amount) override { return amount; }
  void erase(const std::string&) override {}

 private:
  struct Entry {
    char key[64];
    char value[512];
    size_t bytes;
    std::atomic<bool> here;
  };
  struct Table {
    std::atomic<int> count;
    Entry entries[64];
  };
  Entry* find(const std::string& key) {
    for (Entry& e : table_->entries) {
      if (e.here && key == e.key) return &e;
    }
    return nullptr;
  }
  Table* table_ = nullptr;
};

[[noreturn]] void die() {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// It moves some chunks, and its process is killed.
class DyingMover : public FakeMover {
 public:
  DyingMover() : FakeMover(0) {}
  void copy(void* dst, const void* src, size_t bytes) override {
    if (++copies_ == 21) die();
    FakeMover::copy(dst, src, bytes);
  }

 private:
  int copies_ = 0;
};

// Runs `doomed` as the last rank, in a process that is killed then, and `f` as the others.
void with_a_killed_rank(int world, const std::function<void(Communicator&)>& doomed,
                        const std::function<void(Communicator&)>& f) {
  SharedStore store;
  const pid_t child = fork();
  if (child == 0) {
    Communicator comm(store, world - 1, world, small_config(), kLong);
    doomed(comm);
    die();
  }
  std::vector<std::thread> threads;
  for (int r = 0; r < world - 1; ++r) {
    threads.emplace_back([&, r] {
      Communicator comm(store, r, world, small_config(), kLong);
      f(comm);
    });
  }
  for (std::thread& t : threads) t.join();
  waitpid(child, nullptr, 0);
}

void a_rank_is_killed_while_it_sends() {
  with_a_killed_rank(
      2,
      [](Communicator& comm) {
        send(comm, 0, 100, 1);
        Bytes b(kLarge, 1);
        DyingMover mover;
        Message m = message(b, 0);
        m.mover = &mover;
        comm.mail().send(m).wait();
      },
      [](Communicator& comm) {
        Bytes half(kLarge);
        const Request r = comm.mail().receive(message(half, 1));
        expect(ErrorKind::kPeerLost, "rank 1 is lost: its process has died", 1, [&] { r.wait(); });
        CHECK(half[0] == 1 && half[kLarge - 1] == 0);
      });
}

void what_a_rank_sent_before_it_was_killed_still_counts() {
  with_a_killed_rank(
      3,
      [](Communicator& comm) {
        for (int to = 0; to < 2; ++to) {
          for (int tag = 0; tag < 3; ++tag) send(comm, to, 100, tag);
        }
      },
      [](Communicator& comm) {
        std::this_thread::sleep_for(Milliseconds(50));
        for (int tag = 2; tag >= 0; --tag) receive(comm, tag == 1 ? kAnySource : 2, 100, tag);
        expect(ErrorKind::kPeerLost, "has died", 2, [&] { receive(comm, kAnySource, 100, 0); });
      });
}

void who_has_died_is_blamed_before_who_has_left() {
  with_a_killed_rank(
      3,
      [](Communicator& comm) {
        while (!has_left(comm, 0)) std::this_thread::yield();
      },
      [](Communicator& comm) {
        if (comm.rank() == 1) expect(ErrorKind::kPeerLost, "has died", 2, [&] { receive(comm, kAnySource, 100, 0); });
      });
}

void a_killed_rank_is_found_by_the_postman() {
  with_a_killed_rank(
      2, [](Communicator&) {},
      [](Communicator& comm) {
        Bytes b(kLarge);
        Told told;
        comm.mail().send(message(b, 1), told.listener());
        CHECK(contains(told.await(), "has died"));
      });
}

}  // namespace

int main() {
  a_rank_is_killed_while_it_sends();  // before there are threads
  what_a_rank_sent_before_it_was_killed_still_counts();
  who_has_died_is_blamed_before_who_has_left();
  a_killed_rank_is_found_by_the_postman();
  bad_arguments_harm_nothing();
  mismatches();
  who_holds_up_all_is_named();
  nobody_is_blamed_for_who_waits_for_any_rank();
  a_shorter_wait_leaves_the_request_as_it_is();
  what_a_rank_sent_before_it_left_still_counts();
  who_waits_for_a_rank_that_leaves_is_told();
  what_the_last_to_leave_has_sent_is_received();
  an_error_is_cut_between_characters();
  an_abort_ends_every_wait();
  who_finds_that_a_rank_failed_and_left_receives_no_more();
  a_failed_collective_ends_messages_too();
  interrupts();
  closing_ends_what_is_being_sent();
  closing_does_not_wait_for_who_closes();
  messages_are_refused_as_soon_as_calls();
  closing_waits_no_longer_than_the_timeout();
  closing_beside_waits();
  return check::report();
}
