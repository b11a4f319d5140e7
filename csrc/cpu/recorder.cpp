#include "cpu/recorder.h"

#include <algorithm>

namespace pycoll::cpu {

namespace {

Entry unpacked(const uint64_t (&words)[Journal::kWords]) {
  const auto byte = [&](int i) { return static_cast<uint8_t>(words[Journal::kKinds] >> (8 * i)); };
  Entry e;
  e.number = words[Journal::kVersion] / 2;
  e.begin = words[Journal::kBegin];
  e.end = words[Journal::kEnd] & ~Journal::kFailed;
  e.failed = (words[Journal::kEnd] & Journal::kFailed) != 0;
  e.sequence = words[Journal::kSequence];
  e.count = words[Journal::kCount];
  e.shape = words[Journal::kShape];
  e.peer = static_cast<int32_t>(words[Journal::kPeerAndTag]);
  e.tag = static_cast<int32_t>(words[Journal::kPeerAndTag] >> 32);
  e.deed = static_cast<Deed>(byte(0));
  e.collective = static_cast<Collective>(byte(1));
  e.algorithm = static_cast<Algorithm>(byte(2));
  e.dtype = static_cast<DType>(byte(3));
  e.op = static_cast<ReduceOp>(byte(4));
  e.channels = byte(5);
  e.flags = byte(6);
  return e;
}

// Names are looked up by these, and any rank may have written anywhere into memory that it maps.
bool is_sound(const Entry& e) {
  return e.deed <= Deed::kLaunch && e.collective <= Collective::kBarrier && e.algorithm <= Algorithm::kDirect &&
         static_cast<int>(e.dtype) < kDTypeCount && static_cast<int>(e.op) < kReduceOpCount;
}

}  // namespace

std::vector<Entry> read(const Journal& journal, size_t most) {
  std::vector<Entry> entries;
  for (const Journal::Place& place : journal.places) {
    const uint64_t version = load_acquire(place.words[Journal::kVersion]);
    if (version == 0 || version % 2 != 0) continue;
    uint64_t words[Journal::kWords];
    for (int i = 0; i < Journal::kWords; ++i) words[i] = load_acquire(place.words[i]);
    if (load_relaxed(place.words[Journal::kVersion]) != version) continue;
    const Entry entry = unpacked(words);
    if (is_sound(entry)) entries.push_back(entry);
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.number < b.number; });
  if (entries.size() > most) entries.erase(entries.begin(), entries.end() - static_cast<ptrdiff_t>(most));
  return entries;
}

Instant Instant::now() {
  Instant best{};
  uint64_t shortest = ~uint64_t{0};
  for (int i = 0; i < 5; ++i) {  // the one that was interrupted least
    timespec t;
    const uint64_t before = cpu::ticks();
    clock_gettime(CLOCK_MONOTONIC, &t);
    const uint64_t took = cpu::ticks() - before;
    if (took >= shortest) continue;
    shortest = took;
    best = {before + took / 2, static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec};
  }
  return best;
}

int64_t Timebase::ns(uint64_t ticks) const {
  if (b_.ticks == a_.ticks) return a_.ns;
  const auto past = static_cast<long double>(static_cast<int64_t>(ticks - a_.ticks));
  const auto rate = static_cast<long double>(b_.ns - a_.ns) / static_cast<long double>(b_.ticks - a_.ticks);
  return a_.ns + static_cast<int64_t>(past * rate);
}

}  // namespace pycoll::cpu
