// What goes wrong, and what each rank is then told: mismatching calls, ranks that do not come or leave, aborts, queues.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <future>

#include "check.h"
#include "core/layout.h"
#include "ranks.h"

using namespace pycoll;
using cpu::Call;
using cpu::Communicator;
using cpu::ErrorKind;

namespace {

Call all_reduce(std::vector<float>& x, std::optional<Algorithm> algorithm = {}) {
  return {.collective = Collective::kAllReduce,
          .dtype = DType::kFloat32,
          .algorithm = algorithm,
          .in = x.data(),
          .out = x.data(),
          .count = x.size()};
}

Communicator::Turn once(const Call& call) {
  return [call](const Communicator::Runner& run) { run(call); };
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void every_mismatch_is_told_to_every_rank() {
  const std::vector<std::function<void(Call&)>> deviations = {
      [](Call& c) { c.count -= 1; },
      [](Call& c) { c.dtype = DType::kInt32; },
      [](Call& c) { c.op = ReduceOp::kMax; },
      [](Call& c) { c.algorithm = Algorithm::kRing; },
      [](Call& c) { c.algorithm = Algorithm::kTwoShot; },
      [](Call& c) { c = {.collective = Collective::kBarrier}; },
      [](Call& c) { c.collective = Collective::kBroadcast, c.algorithm = {}; },
  };
  for (const int world : {2, 3, 5}) {
    for (const auto& deviate : deviations) {
      std::vector<ErrorKind> kinds;
      const auto errors = run_ranks(
          world, small_config(), Milliseconds(20000),
          [&](Communicator& comm) {
            std::vector<float> x(3000, 1.0f);
            Call call = all_reduce(x, Algorithm::kOneShot);
            if (comm.rank() == world - 1) deviate(call);
            comm.run(call);
          },
          &kinds);
      for (int r = 0; r < world; ++r) {
        CHECK(kinds[r] == ErrorKind::kMismatch);
        CHECK(contains(errors[r], "all_reduce(float32[3000], sum, one_shot)"));
        CHECK(contains(errors[r], "rank " + std::to_string(world - 1) + " "));
      }
    }
  }
}

void roots_must_agree() {
  std::vector<ErrorKind> kinds;
  run_ranks(
      3, small_config(), Milliseconds(20000),
      [](Communicator& comm) {
        char x = 0;
        comm.run(
            {.collective = Collective::kBroadcast, .root = comm.rank() == 1 ? 1 : 0, .in = &x, .out = &x, .count = 1});
      },
      &kinds);
  for (const ErrorKind k : kinds) CHECK(k == ErrorKind::kMismatch);
}

void a_rank_that_does_not_come_is_named() {
  std::vector<ErrorKind> kinds;
  std::atomic<int> waiting{0};
  const auto errors = run_ranks(
      3, small_config(), Milliseconds(300),
      [&](Communicator& comm) {
        std::vector<float> x(10, 1.0f);
        if (comm.rank() == 1) {
          while (waiting < 2) std::this_thread::yield();  // alive, but does not call
          return;
        }
        try {
          comm.run(all_reduce(x));
        } catch (const cpu::Error& e) {
          ++waiting;
          CHECK_EQ(e.rank, 1);
          throw;
        }
      },
      &kinds);
  for (const int r : {0, 2}) {
    CHECK(kinds[r] == ErrorKind::kTimeout);
    CHECK(contains(errors[r], "rank 1"));
  }
}

void a_rank_that_never_attaches_is_named() {
  MapStore store;
  try {
    Communicator comm(store, 0, 2, small_config(), Milliseconds(200));
    CHECK(false);
  } catch (const cpu::Error& e) {
    CHECK(e.kind == ErrorKind::kTimeout);
    CHECK(contains(e.what(), "rank 1"));
  }
}

void a_rank_that_leaves_is_named() {
  std::vector<ErrorKind> kinds;
  const auto errors = run_ranks(
      3, small_config(), Milliseconds(20000),
      [&](Communicator& comm) {
        std::vector<float> x(10, 1.0f);
        comm.run(all_reduce(x));
        if (comm.rank() != 2) comm.run(all_reduce(x));
      },
      &kinds);
  CHECK_EQ(errors[2], std::string());
  for (const int r : {0, 1}) {
    CHECK(kinds[r] == ErrorKind::kPeerLost);
    CHECK(contains(errors[r], "rank 2 has left"));
  }
}

void leaving_after_the_last_call_harms_nobody() {
  for (int i = 0; i < 20; ++i) {
    const auto errors = run_ranks(4, small_config(2), Milliseconds(20000), [&](Communicator& comm) {
      std::vector<float> x(4000, 1.0f);
      for (const Algorithm a : {Algorithm::kOneShot, Algorithm::kTwoShot, Algorithm::kRing, Algorithm::kTree})
        comm.run(all_reduce(x, a));
      CHECK_EQ(x[3999], 256.0f);
    });
    for (const std::string& e : errors) CHECK_EQ(e, std::string());
  }
}

void an_abort_reaches_all_and_is_terminal() {
  const auto errors = run_ranks(3, small_config(), Milliseconds(20000), [](Communicator& comm) {
    std::vector<float> x(10, 1.0f);
    if (comm.rank() == 0) {
      comm.abort("rank 0 gave up");
      return;
    }
    for (int i = 0; i < 2; ++i) {
      try {
        comm.run(all_reduce(x));
        CHECK(false);
      } catch (const cpu::Error& e) {
        CHECK(contains(e.what(), "rank 0 gave up"));
      }
    }
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

void queued_calls_keep_their_order() {
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [](Communicator& comm) {
    std::vector<std::vector<float>> queued(50, std::vector<float>(100, 1.0f));
    std::atomic<int> done{0};
    for (auto& x : queued) {
      const int turn = static_cast<int>(&x - queued.data());
      comm.enqueue(once(all_reduce(x)), [&done, turn](std::exception_ptr failure) {
        CHECK(!failure);
        CHECK_EQ(done.load(), turn);
        ++done;
      });
    }
    std::vector<float> last(100, 2.0f);
    comm.run(all_reduce(last));  // behind all of them
    CHECK_EQ(done.load(), 50);
    CHECK_EQ(last[99], 4.0f);
    for (const auto& x : queued) CHECK_EQ(x[0], 2.0f);
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

void closing_drains_the_queue() {
  std::atomic<int> done{0};
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [&](Communicator& comm) {
    std::vector<float> x(50000, 1.0f);
    for (int i = 0; i < 5; ++i)
      comm.enqueue(once(all_reduce(x)), [&](std::exception_ptr failure) { done += !failure; });
    comm.close();
    comm.close();
    CHECK_EQ(x[49999], 32.0f);
    try {
      comm.run(all_reduce(x));
      CHECK(false);
    } catch (const cpu::Error& e) {
      CHECK(contains(e.what(), "closed"));
    }
  });
  CHECK_EQ(done.load(), 10);
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

void a_closed_communicator_holds_no_memory_but_tensors() {
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [](Communicator& comm) {
    const size_t scratch = comm.footprint();
    std::shared_ptr<void> tensor = comm.allocate(1000);
    CHECK(scratch > 0 && comm.footprint() >= scratch + 1000);
    comm.run({.collective = Collective::kBarrier});
    comm.close();
    std::memset(tensor.get(), 1, 1000);
    CHECK(comm.footprint() >= 1000 && comm.footprint() < scratch);
    comm.abort("too late to matter");
    try {
      (void)comm.allocate(1);
      CHECK(false);
    } catch (const cpu::Error& e) {
      CHECK(contains(e.what(), "closed"));
    }
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

// One thread of rank 0 calls for ever while another aborts and closes, at any moment.
void closing_beside_calls() {
  for (int i = 0; i < 20; ++i) {
    const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [&](Communicator& comm) {
      std::thread closer;
      if (comm.rank() == 0) {
        closer = std::thread([&comm, i] {
          std::this_thread::sleep_for(std::chrono::microseconds(100 * i));
          if (i % 2 == 0) comm.abort("enough");
          comm.close();
        });
      }
      std::vector<float> x(1000, 1.0f);
      try {
        for (;;) comm.run(all_reduce(x));
      } catch (const cpu::Error&) {
        if (closer.joinable()) closer.join();
        throw;
      }
    });
    CHECK(contains(errors[0], i % 2 == 0 ? "" : "closed"));
    CHECK(contains(errors[1], i % 2 == 0 ? "enough" : "rank 0"));
  }
}

void what_comes_after_a_call_may_wait_for_later_ones() {
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [](Communicator& comm) {
    constexpr int kDepth = 3;
    std::vector<std::vector<float>> queued(kDepth, std::vector<float>(100, 1.0f)), called = queued;
    std::vector<std::promise<void>> done(kDepth);
    for (int i = 0; i < kDepth; ++i) {
      comm.enqueue(once(all_reduce(queued[i])), [&, i](std::exception_ptr failure) {
        CHECK(!failure);
        Communicator::hand_on();
        Communicator::hand_on();                              // once is enough
        if (i + 1 < kDepth) done[i + 1].get_future().wait();  // the last ends first
        comm.run(all_reduce(called[i]));
        done[i].set_value();
      });
    }
    done[0].get_future().wait();
    for (int i = 0; i < kDepth; ++i) CHECK(queued[i][0] == 2.0f && called[i][99] == 2.0f);
    Communicator::hand_on();  // of no effect here
    comm.run(all_reduce(queued[0]));
    CHECK_EQ(queued[0][0], 4.0f);
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

// Ranks get to close() before or after their callbacks get to their calls.
void what_callbacks_call_is_done_before_the_end() {
  for (int i = 0; i < 20; ++i) {
    std::atomic<int> right{0};
    const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [&](Communicator& comm) {
      auto x = std::make_shared<std::vector<float>>(100, 1.0f);
      comm.enqueue(once(all_reduce(*x)), [x, &comm, &right, i](std::exception_ptr failure) {
        CHECK(!failure);
        Communicator::hand_on();
        if (comm.rank() == i % 2) std::this_thread::sleep_for(Milliseconds(2));
        comm.run(all_reduce(*x));
        comm.enqueue(once(all_reduce(*x)),
                     [x, &right](std::exception_ptr later) { right += !later && (*x)[99] == 8.0f; });
      });
      comm.close();
    });
    for (const std::string& e : errors) CHECK_EQ(e, std::string());
    CHECK_EQ(right, 2);
  }
}

// As when a future's callback drops the last reference to a process group.
void a_callback_may_destroy_the_communicator(bool hands_on) {
  MapStore store;
  std::vector<std::thread> threads;
  std::atomic<int> done{0};
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      auto comm = std::make_shared<Communicator>(store, r, 2, small_config(), Milliseconds(20000));
      Communicator& c = *comm;
      auto x = std::make_shared<std::vector<float>>(100, 1.0f);
      c.enqueue(once(all_reduce(*x)), [x, &done, hands_on, comm = std::move(comm)](std::exception_ptr failure) mutable {
        CHECK(!failure);
        if (hands_on) Communicator::hand_on();
        comm = nullptr;
        ++done;
      });
    });
  }
  for (std::thread& t : threads) t.join();
  while (done < 2) std::this_thread::yield();
}

void worlds_must_agree() {
  MapStore store;
  std::atomic<int> failed{0};
  std::thread other([&] {
    try {
      Communicator comm(store, 1, 3, small_config(), Milliseconds(500));
    } catch (const cpu::Error&) {
      ++failed;
    }
  });
  try {
    Communicator comm(store, 0, 2, small_config(), Milliseconds(500));
  } catch (const cpu::Error& e) {
    failed += contains(e.what(), "world size");
  }
  other.join();
  CHECK_EQ(failed.load(), 2);
}

// Ranks 0, 1 and 2 are the program's ranks 7, 1 and 9; the last one deviates.
const cpu::Names kPart{"part", {7, 1, 9}};

void names_are_of_two_numbers_where_these_differ() {
  CHECK_EQ(kPart.rank(0), std::string("rank 0 (global rank 7)"));
  CHECK_EQ(kPart.rank(1), std::string("rank 1"));
  CHECK_EQ(kPart.rank(3), std::string("rank 3"));  // nobody's
  CHECK_EQ(cpu::Names{}.rank(2), std::string("rank 2"));
  CHECK_EQ(kPart.numbers({0, 1, 2}), std::string("0 (global rank 7), 1, 2 (global rank 9)"));
  CHECK_EQ(kPart.numbers({1, 0, 2}, ",", 2), std::string("1,0 (global rank 7),..."));
}

void every_error_has_both_numbers() {
  char byte = 0;
  std::atomic<int> waiting{0};
  struct Case {
    std::function<void(Communicator&)> last, others;
    std::vector<std::string> parts;
  };
  const auto barrier = [](Communicator& comm) { comm.run({.collective = Collective::kBarrier}); };
  const auto nothing = [](Communicator&) {};
  const auto late = [&](Communicator& comm) {
    const struct Counted {
      std::atomic<int>& count;
      ~Counted() { ++count; }
    } counted{waiting};
    comm.set_timeout(Milliseconds(2000));
    barrier(comm);
  };
  const auto exchange = [&](Communicator& comm) {
    if (comm.rank() == 0) comm.mail().receive({.data = &byte, .bytes = 1, .peer = 2, .tag = 0}).wait();
    if (comm.rank() == 2) comm.mail().send({.data = &byte, .bytes = 0, .peer = 0, .tag = 0}).wait();
    barrier(comm);
  };
  const std::vector<Case> cases = {
      {[&](Communicator& comm) { comm.run({.collective = Collective::kBroadcast, .in = &byte, .out = &byte}); },
       barrier,
       {"rank 0 (global rank 7),1 call #1 barrier", "rank 2 (global rank 9) call #1 broadcast"}},
      {nothing, barrier, {"rank 2 (global rank 9) has left: it closed its communicator while rank "}},
      {[&](Communicator&) {
         while (waiting < 2) std::this_thread::yield();
       },
       late,
       {" waited 2000 ms for rank 2 (global rank 9), which is alive"}},
      {exchange, exchange, {"rank 0 (global rank 7) receives 1 bytes from rank 2 (global rank 9) with tag 0"}},
  };
  for (const Case& each : cases) {
    const auto errors = run_ranks(
        3, small_config(), Milliseconds(20000),
        [&each](Communicator& comm) { (comm.rank() == 2 ? each.last : each.others)(comm); }, nullptr, kPart);
    for (const std::string& part : each.parts) CHECK(contains(errors[0], part) && contains(errors[1], part));
  }
}

void who_does_not_join_has_both_numbers() {
  MapStore store;
  try {
    Communicator comm(store, 1, 3, small_config(), Milliseconds(200), kPart);
    CHECK(false);
  } catch (const cpu::Error& e) {
    CHECK_EQ(e.rank, 0);
    CHECK(contains(e.what(), "ranks 0 (global rank 7), 2 (global rank 9) of 3 did not join"));
  }
  try {
    Communicator comm(store, 0, 2, small_config(), Milliseconds(200), kPart);
    CHECK(false);
  } catch (const cpu::Error& e) {
    CHECK(e.kind == ErrorKind::kUsage && contains(e.what(), "3 global ranks were given for a world of 2"));
  }
}

// Other users than root may have as many under way, on the way between processes, as a process may have open.
void many_ranks_meet_though_few_descriptors_may_be_under_way() {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit few{200, 200};
    const bool limited = setrlimit(RLIMIT_NOFILE, &few) == 0 && (geteuid() != 0 || setuid(65534) == 0);
    const auto errors = run_ranks(16, small_config(), Milliseconds(20000), [](Communicator& comm) {
      std::vector<float> x(100, 1.0f);
      comm.run(all_reduce(x));
      CHECK_EQ(x[99], 16.0f);
    });
    for (const std::string& e : errors) CHECK_EQ(e, std::string());
    _exit(limited ? check::report() : 2);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

}  // namespace

int main() {
  many_ranks_meet_though_few_descriptors_may_be_under_way();  // before there are threads
  every_mismatch_is_told_to_every_rank();
  roots_must_agree();
  a_rank_that_does_not_come_is_named();
  a_rank_that_never_attaches_is_named();
  a_rank_that_leaves_is_named();
  leaving_after_the_last_call_harms_nobody();
  an_abort_reaches_all_and_is_terminal();
  queued_calls_keep_their_order();
  closing_drains_the_queue();
  a_closed_communicator_holds_no_memory_but_tensors();
  closing_beside_calls();
  what_comes_after_a_call_may_wait_for_later_ones();
  what_callbacks_call_is_done_before_the_end();
  for (const bool hands_on : {false, true}) a_callback_may_destroy_the_communicator(hands_on);
  worlds_must_agree();
  names_are_of_two_numbers_where_these_differ();
  every_error_has_both_numbers();
  who_does_not_join_has_both_numbers();
  return check::report();
}
