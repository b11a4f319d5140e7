// The flight recorder: what a rank has done last, in memory that its peers map, so that whoever survives can read what a
// killed or hung rank was doing (csrc/README.md, R1 to R5). A call costs two looks at a clock and a cache line.
#pragma once

#include <cstdint>
#include <ctime>
#include <vector>

#include "core/atomic.h"
#include "core/record.h"

namespace pycoll::cpu {

// A counter that runs alike on all cores, in units of its own (see Timebase). The CPU's own costs a third of the
// system's clock.
inline uint64_t ticks() {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
  uint64_t count;
  asm volatile("mrs %0, cntvct_el0" : "=r"(count));
  return count;
#else
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000 + static_cast<uint64_t>(t.tv_nsec);
#endif
}

enum class Deed : uint8_t { kCollective, kSend, kReceive, kLaunch };  // a launch: of a collective, on this rank's GPU

// What a rank has done, or does.
struct Entry {
  enum Flags : uint8_t { kQueued = 1, kOnGpu = 2, kCaptured = 4 };  // captured: a graph holds it, and may replay it

  uint64_t number = 0;    // in its journal, from 1
  uint64_t begin = 0;     // ticks
  uint64_t end = 0;       // ticks; 0: it has not ended
  bool failed = false;    // it ended so
  uint64_t sequence = 0;  // of a collective, see CallRecord; of a message or launch, how many there were before
  uint64_t count = 0;     // see CallRecord; of an all-to-all, the elements that this rank sends or gets, whichever are
                          // more; of a message, bytes
  uint64_t shape = 0;     // see CallRecord; of a message, a fingerprint of its element type
  int32_t peer = 0;       // the root; the other rank of a message (-1: any)
  int32_t tag = 0;        // of a message
  Deed deed{};
  Collective collective{};
  Algorithm algorithm{};
  DType dtype{};
  ReduceOp op{};
  uint8_t channels = 0;
  uint8_t flags = 0;

  // Of a call, the elements of one rank's tensor; of a message, all of it.
  uint64_t bytes() const { return deed == Deed::kSend || deed == Deed::kReceive ? count : count * size_of(dtype); }
};

// The last entries of one writer. Zeroed memory is an empty journal.
struct Journal {
  static constexpr uint64_t kEntries = 256;
  // An entry as it lies in memory, a cache line. Its version is 2 n of entry n, or 2 n - 1 while that is being written.
  enum Word { kVersion, kBegin, kEnd, kSequence, kCount, kShape, kPeerAndTag, kKinds, kWords };
  static constexpr uint64_t kFailed = uint64_t{1} << 63;  // in kEnd
  struct alignas(64) Place {
    uint64_t words[kWords];
  };
  Place places[kEntries];

  // What all entries of one sort come to, also those that others have overwritten.
  enum Sort : uint8_t { kSend = static_cast<int>(Collective::kBarrier) + 1, kReceive, kSorts };  // or a collective
  struct Total {
    uint64_t calls;
    uint64_t bytes;
    uint64_t ticks;  // from begin to end
  };
  Total totals[kSorts];

  static int sort_of(Deed deed, Collective collective) {
    return deed == Deed::kSend ? kSend : deed == Deed::kReceive ? kReceive : static_cast<int>(collective);
  }
  static uint64_t peer_and_tag(int32_t peer, int32_t tag) {
    return static_cast<uint32_t>(peer) | static_cast<uint64_t>(static_cast<uint32_t>(tag)) << 32;
  }
  static uint64_t kinds(const Entry& e) {
    return static_cast<uint64_t>(e.deed) | static_cast<uint64_t>(e.collective) << 8 |
           static_cast<uint64_t>(e.algorithm) << 16 | static_cast<uint64_t>(e.dtype) << 24 |
           static_cast<uint64_t>(e.op) << 32 | static_cast<uint64_t>(e.channels) << 40 |
           static_cast<uint64_t>(e.flags) << 48;
  }
};
static_assert(sizeof(Journal::Place) == 64);

// Each rank has three, since they have different writers.
enum JournalKind : int { kCalls, kMessages, kLaunches, kJournals };

// Who writes a journal: one thread at a time.
class Recorder {
 public:
  explicit Recorder(Journal& journal) : journal_(journal) {}

  // Returns the entry's number, which is set here, as is when it began.
  uint64_t begin(const Entry& e) {
    const uint64_t n = ++last_;
    uint64_t* const at = words(n);
    store_relaxed(at[Journal::kVersion], 2 * n - 1);
    store_release(at[Journal::kBegin], ticks());  // whoever sees this, or what follows, sees that
    store_release(at[Journal::kEnd], uint64_t{0});
    store_release(at[Journal::kSequence], e.sequence);
    store_release(at[Journal::kCount], e.count);
    store_release(at[Journal::kShape], e.shape);
    store_release(at[Journal::kPeerAndTag], Journal::peer_and_tag(e.peer, e.tag));
    store_release(at[Journal::kKinds], Journal::kinds(e));
    store_release(at[Journal::kVersion], 2 * n);
    Journal::Total& total = journal_.totals[Journal::sort_of(e.deed, e.collective)];
    add(total.calls, 1);
    add(total.bytes, e.bytes());
    return n;
  }

  void end(uint64_t n, bool failed) {
    if (!is_there(n)) return;
    uint64_t* const at = words(n);
    const uint64_t now = ticks();
    store_release(at[Journal::kEnd], now | (failed ? Journal::kFailed : 0));
    const uint64_t kinds = load_relaxed(at[Journal::kKinds]);
    const int sort = Journal::sort_of(static_cast<Deed>(kinds & 0xff), static_cast<Collective>(kinds >> 8 & 0xff));
    if (sort < Journal::kSorts) add(journal_.totals[sort].ticks, now - load_relaxed(at[Journal::kBegin]));
  }

  // Of a receive from any, before it ends.
  void set_peer(uint64_t n, int peer, int tag) {
    if (is_there(n)) store_release(words(n)[Journal::kPeerAndTag], Journal::peer_and_tag(peer, tag));
  }

  uint64_t count() const { return last_; }  // of entries begun

 private:
  static void add(uint64_t& total, uint64_t more) { store_relaxed(total, load_relaxed(total) + more); }
  uint64_t* words(uint64_t n) { return journal_.places[n % Journal::kEntries].words; }
  // So many may have begun since that another has its place.
  bool is_there(uint64_t n) { return load_relaxed(words(n)[Journal::kVersion]) == 2 * n; }

  Journal& journal_;
  uint64_t last_ = 0;
};

// The last entries of a journal, `most` of them, oldest first, from any rank at any time. An entry that is being written,
// or makes no sense, is left out.
std::vector<Entry> read(const Journal& journal, size_t most = Journal::kEntries);

// The same moment by two clocks.
struct Instant {
  uint64_t ticks;
  int64_t ns;  // CLOCK_MONOTONIC: the same for all processes of a machine

  static Instant now();
};

// Ticks as time, from two moments, the further apart the better.
class Timebase {
 public:
  Timebase(Instant a, Instant b) : a_(a), b_(b) {}
  int64_t ns(uint64_t ticks) const;
  int64_t span(uint64_t ticks) const { return ns(a_.ticks + ticks) - a_.ns; }

 private:
  const Instant a_, b_;
};

}  // namespace pycoll::cpu
