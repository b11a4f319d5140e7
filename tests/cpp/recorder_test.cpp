// The recorder: what readers see while a rank writes, what is kept of failures, and what a trace says of ranks that hang.
#include "cpu/recorder.h"

#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <thread>

#include "check.h"
#include "ranks.h"

using namespace pycoll;
using cpu::Communicator;
using cpu::Deed;
using cpu::Entry;
using cpu::Journal;
using cpu::Recorder;

namespace {

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Entry numbered(uint64_t n) {
  Entry e;
  e.sequence = e.count = e.shape = n;
  e.peer = e.tag = static_cast<int32_t>(n);
  e.channels = static_cast<uint8_t>(n);
  return e;
}

bool is_whole(const Entry& e) {
  const uint64_t n = e.sequence;
  return e.number == n && e.count == n && e.shape == n && e.peer == static_cast<int32_t>(n) && e.tag == e.peer &&
         e.channels == static_cast<uint8_t>(n) && e.begin != 0 && (e.end == 0 || e.end >= e.begin);
}

void the_last_entries_are_kept_in_order() {
  const auto journal = std::make_unique<Journal>();
  CHECK(read(*journal).empty());
  Recorder recorder(*journal);
  for (uint64_t n = 1; n <= Journal::kEntries + 10; ++n) CHECK_EQ(recorder.begin(numbered(n)), n);
  const std::vector<Entry> all = read(*journal), few = read(*journal, 3);
  CHECK_EQ(all.size(), Journal::kEntries);
  for (size_t i = 0; i < all.size(); ++i) CHECK_EQ(all[i].sequence, i + 11);
  CHECK_EQ(few.size(), size_t{3});
  CHECK_EQ(few.front().sequence, Journal::kEntries + 8);
}

void an_entry_ends_where_it_began() {
  const auto journal = std::make_unique<Journal>();
  Recorder recorder(*journal);
  const uint64_t first = recorder.begin(numbered(1)), second = recorder.begin(numbered(2));
  recorder.set_peer(first, 7, 1);
  recorder.end(first, /*failed=*/true);
  const std::vector<Entry> two = read(*journal);
  CHECK(two[0].end != 0 && two[0].failed && two[0].peer == 7 && two[0].tag == 1);
  CHECK_EQ(two[1].end, uint64_t{0});
  for (uint64_t n = 3; n <= Journal::kEntries + 2; ++n) recorder.begin(numbered(n));
  recorder.end(second, /*failed=*/false);  // another has its place
  recorder.set_peer(second, 7, 2);
  for (const Entry& e : read(*journal)) CHECK(e.end == 0 && is_whole(e));
}

void what_makes_no_sense_is_left_out() {
  const auto journal = std::make_unique<Journal>();
  Recorder recorder(*journal);
  for (uint64_t n = 1; n <= 7; ++n) recorder.begin(numbered(n));
  for (int i = 0; i < 5; ++i) journal->places[i + 1].words[Journal::kKinds] = uint64_t{0xff} << (8 * i);
  CHECK_EQ(read(*journal).size(), size_t{2});
}

void totals_outlive_entries() {
  const auto journal = std::make_unique<Journal>();
  Recorder recorder(*journal);
  constexpr uint64_t kCalls = 3 * Journal::kEntries;
  uint64_t ticks = 0;
  for (uint64_t n = 1; n <= kCalls; ++n) {
    Entry e = numbered(n);
    e.deed = n % 3 == 0 ? Deed::kSend : Deed::kCollective;
    e.collective = n % 3 == 1 ? Collective::kBroadcast : Collective::kBarrier;
    e.dtype = DType::kFloat16;
    const uint64_t number = recorder.begin(e);
    if (n % 3 == 2) continue;  // it hangs
    recorder.end(number, /*failed=*/n % 2 == 0);
    const Entry last = read(*journal, 1).front();
    if (n % 3 == 0) ticks += last.end - last.begin;
  }
  const auto bytes = [&](uint64_t rest) {
    uint64_t sum = 0;
    for (uint64_t n = 1; n <= kCalls; ++n) sum += n % 3 == rest ? n : 0;
    return sum;
  };
  const auto& [calls, sent, spent] = journal->totals[Journal::kSend];
  CHECK_EQ(calls, kCalls / 3);
  CHECK_EQ(sent, bytes(0));
  CHECK_EQ(spent, ticks);
  CHECK_EQ(journal->totals[static_cast<int>(Collective::kBroadcast)].bytes, 2 * bytes(1));
  const Journal::Total& hung = journal->totals[static_cast<int>(Collective::kBarrier)];
  CHECK(hung.calls == kCalls / 3 && hung.bytes == 2 * bytes(2) && hung.ticks == 0);
  CHECK_EQ(journal->totals[Journal::kReceive].calls, uint64_t{0});
}

// Readers see entries whole or not at all, however fast the ring goes round.
void readers_see_no_halves() {
  const auto journal = std::make_unique<Journal>();
  std::atomic<bool> written{false};
  std::vector<std::thread> readers;
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      uint64_t newest = 0;
      do {
        const std::vector<Entry> entries = read(*journal);
        CHECK(entries.size() <= Journal::kEntries);
        for (const Entry& e : entries) CHECK(is_whole(e));
        if (entries.empty()) continue;
        CHECK(entries.back().number >= newest);
        newest = entries.back().number;
      } while (!written);
    });
  }
  Recorder recorder(*journal);
  for (uint64_t n = 1; n <= 1'000'000; ++n) recorder.end(recorder.begin(numbered(n)), false);
  written = true;
  for (std::thread& t : readers) t.join();
}

void ticks_are_time() {
  const cpu::Instant a = cpu::Instant::now();
  std::this_thread::sleep_for(Milliseconds(20));
  const cpu::Instant between = cpu::Instant::now();
  std::this_thread::sleep_for(Milliseconds(20));
  const cpu::Timebase time(a, cpu::Instant::now());
  CHECK_EQ(time.ns(a.ticks), a.ns);
  CHECK(std::abs(time.ns(between.ticks) - between.ns) < 1'000'000);  // of 20 000 000
  CHECK(time.ns(a.ticks - 1000) < a.ns);
  CHECK_EQ(cpu::Timebase(a, a).ns(a.ticks + 5), a.ns);
}

cpu::Call all_reduce(std::vector<float>& x) {
  return {.collective = Collective::kAllReduce,
          .dtype = DType::kFloat32,
          .in = x.data(),
          .out = x.data(),
          .count = x.size()};
}

// A thread of rank 0 asks while another of its threads waits in a call.
void a_trace_shows_who_waits() {
  std::atomic<bool> seen{false};
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [&](Communicator& comm) {
    std::vector<float> x(300, 1.0f);
    comm.run(all_reduce(x));
    if (comm.rank() == 1) {
      while (!seen) std::this_thread::yield();
      return comm.run(all_reduce(x));
    }
    std::thread watcher([&] {
      std::string trace;
      // Not what one moment is like: the calls are read before who waits.
      while (!contains(trace, "\"waits_for\":1") || !contains(trace, "\"sequence\":2,\"state\":\"begun\"")) {
        trace = comm.trace();
      }
      CHECK(contains(trace, "\"call\":\"all_reduce\",\"bytes\":1200,\"dtype\":\"float32\",\"count\":300"));
      CHECK(contains(trace, "\"error\":null"));
      seen = true;
    });
    comm.run(all_reduce(x));
    watcher.join();
    comm.close();
    try {
      (void)comm.trace();
      CHECK(false);
    } catch (const cpu::Error& e) {
      CHECK(contains(e.what(), "closed"));
    }
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

void messages_are_recorded() {
  const auto errors = run_ranks(2, small_config(), Milliseconds(20000), [](Communicator& comm) {
    char x[10] = {};
    const cpu::Message message{.data = x, .bytes = 10, .peer = comm.rank() == 0 ? 1 : cpu::kAnySource, .tag = 3};
    (comm.rank() == 0 ? comm.mail().send(message) : comm.mail().receive(message)).wait();
    comm.run({.collective = Collective::kBarrier});
    const std::string trace = comm.trace();
    CHECK(contains(trace, "\"call\":\"send\",\"bytes\":10,\"peer\":1,\"tag\":3"));
    CHECK(contains(trace, "\"call\":\"recv\",\"bytes\":10,\"peer\":0,\"tag\":3"));  // known by now
    comm.run({.collective = Collective::kBarrier});
  });
  for (const std::string& e : errors) CHECK_EQ(e, std::string());
}

std::vector<std::string> mismatch() {
  return run_ranks(2, small_config(), Milliseconds(20000), [](Communicator& comm) {
    std::vector<float> x(3 + comm.rank(), 1.0f);
    comm.run(all_reduce(x));
  });
}

void a_failure_leaves_a_file_for_each_rank() {
  char folder[] = "/tmp/pycoll-recorder-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  setenv("PYCOLL_TRACE", (std::string(folder) + "/new/folder").c_str(), 1);
  const std::vector<std::string> first = mismatch(), second = mismatch();  // of the same names, in the same process
  int files = 0;
  for (const auto& file : std::filesystem::directory_iterator(std::string(folder) + "/new/folder")) {
    std::ifstream in(file.path());
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    CHECK(contains(text, "\"kind\":\"MismatchError\"") && contains(text, "\"count\":3") &&
          contains(text, "\"count\":4"));
    CHECK(text.ends_with("}\n"));
    ++files;
  }
  CHECK_EQ(files, 4);
  // What cannot be written is no second error.
  const std::string in_the_way = std::string(folder) + "/file";
  std::ofstream(in_the_way) << "not a folder";
  setenv("PYCOLL_TRACE", in_the_way.c_str(), 1);
  CHECK(mismatch() == first);
  unsetenv("PYCOLL_TRACE");
  std::filesystem::remove_all(folder);
}

}  // namespace

int main() {
  setenv("PYCOLL_LOG", "error", 1);
  the_last_entries_are_kept_in_order();
  an_entry_ends_where_it_began();
  what_makes_no_sense_is_left_out();
  totals_outlive_entries();
  readers_see_no_halves();
  ticks_are_time();
  a_trace_shows_who_waits();
  messages_are_recorded();
  a_failure_leaves_a_file_for_each_rank();
  return check::report();
}
