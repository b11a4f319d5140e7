// The block logic of every algorithm, as a device with several threads a rank runs it: ranks x group threads over plain
// memory, all world sizes 1 to 8, several calls in a row so that epochs, credits and slots are used again.
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <thread>

#include "algorithms/call.h"
#include "check.h"
#include "host_group.h"

using namespace pycoll;

namespace {

struct Step {
  Collective collective;
  Algorithm algorithm;
  size_t count;
  bool in_heap;  // every other rank's tensors lie in its heap
  bool fails = false;
};

constexpr int kThreads = 3;
constexpr int kChannels = 2;
constexpr size_t kHeap = Geometry::kPage;
constexpr size_t kWordBytes = 16 * (1 + 2 * 64);  // a header, and two areas of 64 units: a chunk of 128 int32

struct World {
  Geometry geometry;
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<std::byte*> base;

  explicit World(int world)
      : geometry{world, kChannels, 2 + world % 2, 256 * static_cast<size_t>(world), 256, kHeap, kWordBytes} {
    for (int r = 0; r < world; ++r) {
      memory.push_back(std::make_unique<std::byte[]>(geometry.segment_bytes() + 128));
      void* p = memory.back().get();
      size_t room = geometry.segment_bytes() + 128;
      base.push_back(static_cast<std::byte*>(std::align(128, geometry.segment_bytes(), p, room)));
    }
  }
};

int32_t value(int step, int rank, size_t i) {
  return static_cast<int32_t>((step * 31 + rank * 7 + static_cast<int>(i) * 3) % 1009);
}

bool gathers(const Step& s) { return s.collective == Collective::kAllGather || s.collective == Collective::kGather; }
bool scatters(const Step& s) {
  return s.collective == Collective::kReduceScatter || s.collective == Collective::kScatter;
}
// What `from` sends `to` in an all-to-all of `count`.
uint64_t count_between(size_t count, int from, int to) { return count * (from + 1) / (to + 1) % 1001; }

// What rank `rank` must end up with; the last rank is the root.
int32_t expected(const Step& s, int step, int world, int rank, size_t i) {
  if (s.collective == Collective::kBroadcast) return value(step, world - 1, i);
  if (s.collective == Collective::kScatter) return value(step, world - 1, i + rank * (s.count / world));
  if (gathers(s)) return value(step, static_cast<int>(i / s.count), i % s.count);
  if (s.collective == Collective::kAllToAll) {
    for (int from = 0;; ++from) {
      const uint64_t here = count_between(s.count, from, rank);
      if (i >= here) {
        i -= here;
        continue;
      }
      for (int to = 0; to < rank; ++to) i += count_between(s.count, from, to);
      return value(step, from, i);
    }
  }
  const size_t shift = s.collective == Collective::kReduceScatter ? rank * (s.count / world) : 0;
  int32_t sum = 0;
  for (int r = 0; r < world; ++r) sum += value(step, r, i + shift);
  return sum;
}

class Rank {
 public:
  Rank(World& world, int rank, uint64_t first_exchange = 0)
      : table_{rank, world.geometry, world.base.data()},
        group_(kThreads),
        first_exchange_(first_exchange),
        records_(world.geometry.world) {
    for (int c = 0; c < kChannels; ++c) links_.emplace_back(table_, c);
  }
  int mismatches() const { return group_.mismatches; }

  void run(const std::vector<Step>& steps) {
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { thread_main(steps, t); });
    for (std::thread& t : threads) t.join();
  }

 private:
  using Exec = HostThreadExecutor<int32_t, ReduceOp::kSum>;

  void thread_main(const std::vector<Step>& steps, int thread) {
    Exec exec(group_, thread, table_.geometry.world);
    WindowState states[kChannels];
    for (WindowState& s : states) s.exchanges = first_exchange_;
    for (int k = 0; k < static_cast<int>(steps.size()); ++k) {
      if (exec.leader()) prepare(steps[k], k);
      exec.sync(true);
      bool ok = true;
      for (int c = 0; ok && c < kChannels; ++c) ok = run_step(exec, steps[k], c, states[c], k);
      CHECK_EQ(ok, !steps[k].fails);
      if (!ok) return;
      exec.sync(true);
      if (exec.leader()) verify(steps[k], k);
    }
  }

  void prepare(const Step& s, int step) {
    const int world = table_.geometry.world;
    InOut sizes = elements_of(s.collective, s.count, world);
    send_.clear();
    recv_.clear();
    if (s.collective == Collective::kAllToAll) {
      for (int r = 0; r < world; ++r) {
        send_.push_back(count_between(s.count, table_.rank, r));
        recv_.push_back(count_between(s.count, r, table_.rank));
      }
      sizes = {std::accumulate(send_.begin(), send_.end(), uint64_t{0}),
               std::accumulate(recv_.begin(), recv_.end(), uint64_t{0})};
    }
    in_heap_ = s.in_heap && (table_.rank + step) % 2 == 0;
    out_count_ = sizes.out;
    private_.assign(sizes.in + sizes.out + 1, -1);
    in_ = in_heap_ ? reinterpret_cast<int32_t*>(table_.heap(table_.rank)) : private_.data();
    out_ = in_;  // in place, or where one is a block of the other: the own one
    if (gathers(s)) in_ += table_.rank * s.count;
    if (scatters(s)) out_ += table_.rank * sizes.out;
    if (s.collective == Collective::kAllToAll) out_ += sizes.in;
    for (size_t i = 0; i < sizes.in; ++i) in_[i] = value(step, table_.rank, i);
  }

  CallRecord record(const Step& s, int step) const {
    const auto offset = [&](const int32_t* p) {
      return in_heap_ ? static_cast<uint64_t>(reinterpret_cast<const std::byte*>(p) - table_.heap(table_.rank))
                      : kNotMapped;
    };
    return {static_cast<uint64_t>(step),
            s.collective == Collective::kAllToAll ? 0 : s.count,
            offset(in_),
            offset(out_),
            table_.geometry.world - 1,
            s.collective,
            DType::kInt32,
            ReduceOp::kSum,
            s.algorithm,
            0};
  }

  bool run_step(Exec& exec, const Step& s, int channel, WindowState& state, int step) {
    const CallRecord mine = record(s, step);
    Operation op{reinterpret_cast<std::byte*>(in_),
                 reinterpret_cast<std::byte*>(out_),
                 sizeof(int32_t),
                 table_.rank,
                 table_.geometry.world,
                 {},
                 send_.empty() ? nullptr : send_.data(),
                 recv_.empty() ? nullptr : recv_.data()};
    const auto enter = [&](Window<Exec>& w) {
      return enter_comparing(exec, w, table_, channel, state, records_.data(), mine);
    };
    return dispatch_call(mine.collective, mine.algorithm, [&](auto tag) {
      return run_call<typename decltype(tag)::type>(exec, op, table_, channel, kChannels, links_[channel], state,
                                                    records_.data(), mine, enter);
    });
  }

  void verify(const Step& s, int step) const {
    const int world = table_.geometry.world;
    const bool for_root = s.collective == Collective::kGather || s.collective == Collective::kReduce;
    if (for_root && table_.rank != world - 1) return;
    size_t wrong = 0;
    for (size_t i = 0; i < out_count_; ++i) wrong += out_[i] != expected(s, step, world, table_.rank, i);
    CHECK_EQ(wrong, size_t{0});
  }

  PeerTable table_;
  HostThreadGroup group_;
  const uint64_t first_exchange_;
  std::vector<CallRecord> records_;
  std::deque<ChannelLinks> links_;
  bool in_heap_ = false;
  std::vector<int32_t> private_;
  std::vector<uint64_t> send_, recv_;  // of an all-to-all
  size_t out_count_ = 0;
  int32_t *in_ = nullptr, *out_ = nullptr;
};

std::vector<Step> all_steps(int world) {
  std::vector<Step> steps;
  for (const size_t count : {size_t{0}, size_t{1}, size_t{131}, size_t{1500}}) {
    for (const bool in_heap : {false, true}) {
      for (const Algorithm a : {Algorithm::kOneShot, Algorithm::kOneShotLl, Algorithm::kTwoShot, Algorithm::kTwoShotLl,
                                Algorithm::kRing, Algorithm::kTwoShotLl, Algorithm::kTree, Algorithm::kMultimem}) {
        steps.push_back({Collective::kAllReduce, a, count, in_heap});
      }
      for (const Collective c : {Collective::kBroadcast, Collective::kReduce, Collective::kAllGather,
                                 Collective::kGather, Collective::kAllToAll}) {
        steps.push_back({c, Algorithm::kDirect, count, in_heap});
      }
      for (const Collective c : {Collective::kReduceScatter, Collective::kScatter}) {
        steps.push_back({c, Algorithm::kDirect, count * world, in_heap});
      }
    }
  }
  return steps;
}

// All ranks at once, each with its own steps.
void run_ranks(std::deque<Rank>& ranks, const std::vector<std::vector<Step>>& steps) {
  std::vector<std::thread> threads;
  for (size_t r = 0; r < ranks.size(); ++r) threads.emplace_back([&, r] { ranks[r].run(steps[r % steps.size()]); });
  for (std::thread& t : threads) t.join();
}

void test_all_steps_again_and_again(int world, uint64_t first_exchange) {
  World memory(world);
  std::deque<Rank> ranks;
  for (int r = 0; r < world; ++r) ranks.emplace_back(memory, r, first_exchange);
  // What an earlier turn of the flags may have left: it must not be taken for what is waited for.
  for (int r = 0; r < world && first_exchange > 0; ++r) {
    const PeerTable table{r, memory.geometry, memory.base.data()};
    const uint64_t stale = uint64_t{static_cast<uint32_t>(first_exchange + 8) | 0x80000000u} << 32 | 12345;
    const size_t words = world * kWordBytes / sizeof(uint64_t);
    for (int c = 0; c < kChannels; ++c) {
      for (const uint64_t parity : {0, 1}) std::fill_n(table.words(r, c, parity, 0), words, stale);
    }
  }
  run_ranks(ranks, {all_steps(world)});
  for (const Rank& rank : ranks) CHECK_EQ(rank.mismatches(), 0);
}

// Ranks that differ from rank 0 in one respect: all are told, none hangs.
void test_mismatch(int world, const Step& first, const Step& others) {
  World memory(world);
  std::deque<Rank> ranks;
  for (int r = 0; r < world; ++r) ranks.emplace_back(memory, r);
  std::vector<std::vector<Step>> steps(world, {others});
  steps[0] = {first};
  run_ranks(ranks, steps);
  for (const Rank& rank : ranks) CHECK_EQ(rank.mismatches(), 1);
}

}  // namespace

int main() {
  for (int world = 1; world <= 8; ++world) test_all_steps_again_and_again(world, 0);
  for (const int world : {2, 3, 8}) test_all_steps_again_and_again(world, (uint64_t{1} << 32) - 3);
  const auto all_reduce = [](Algorithm a, size_t count) { return Step{Collective::kAllReduce, a, count, false, true}; };
  for (const int world : {2, 3, 5}) {
    for (const Algorithm a : {Algorithm::kOneShotLl, Algorithm::kTwoShotLl, Algorithm::kTwoShot}) {
      test_mismatch(world, all_reduce(a, 100), all_reduce(a, 101));
      test_mismatch(world, all_reduce(a, 0), all_reduce(a, 1));
      test_mismatch(world, all_reduce(a, 100), all_reduce(Algorithm::kRing, 100));
      test_mismatch(world, all_reduce(Algorithm::kMultimem, 100), all_reduce(a, 100));
      test_mismatch(world, {Collective::kBroadcast, Algorithm::kDirect, 100, false, true}, all_reduce(a, 100));
    }
  }
  return check::report();
}
