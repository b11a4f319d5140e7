// The block logic of every algorithm, as a device with several threads a rank runs it: ranks x group threads over plain
// memory, all world sizes 1 to 8, several calls in a row so that epochs, credits and slots are used again.
#include <cstring>
#include <deque>
#include <memory>
#include <thread>

#include "algorithms/cut.h"
#include "algorithms/direct.h"
#include "algorithms/links.h"
#include "algorithms/one_shot.h"
#include "algorithms/run.h"
#include "algorithms/two_shot.h"
#include "check.h"
#include "host_group.h"

using namespace pycoll;

namespace {

struct Step {
  Collective collective;
  Algorithm algorithm;
  size_t count;
  bool in_heap;  // every other rank's tensors lie in its heap
};

constexpr int kThreads = 3;
constexpr size_t kHeap = Geometry::kPage;

struct World {
  Geometry geometry;
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<std::byte*> base;

  explicit World(int world) : geometry{world, 2, 2 + world % 2, 256 * static_cast<size_t>(world), 256, kHeap} {
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

// What rank `rank` must end up with.
int32_t expected(const Step& s, int step, int world, int rank, size_t i) {
  if (s.collective == Collective::kBroadcast) return value(step, world - 1, i);
  if (s.collective == Collective::kAllGather) return value(step, static_cast<int>(i / s.count), i % s.count);
  const size_t shift = s.collective == Collective::kReduceScatter ? rank * (s.count / world) : 0;
  int32_t sum = 0;
  for (int r = 0; r < world; ++r) sum += value(step, r, i + shift);
  return sum;
}

class Rank {
 public:
  Rank(World& world, int rank) : table_{rank, world.geometry, world.base.data()}, group_(kThreads) {
    for (int c = 0; c < 2; ++c) links_.emplace_back(table_, c);
  }

  void run(const std::vector<Step>& steps) {
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) threads.emplace_back([&, t] { thread_main(steps, t); });
    for (std::thread& t : threads) t.join();
  }

 private:
  using Exec = HostThreadExecutor<int32_t, ReduceOp::kSum>;

  void thread_main(const std::vector<Step>& steps, int thread) {
    Exec exec(group_, thread, table_.geometry.world);
    WindowState states[2];
    for (int k = 0; k < static_cast<int>(steps.size()); ++k) {
      if (exec.leader()) prepare(steps[k], k);
      exec.sync(true);
      for (int channel = 0; channel < 2; ++channel) run_step(exec, steps[k], channel, states[channel], k);
      exec.sync(true);
      if (exec.leader()) verify(steps[k], k);
    }
  }

  void prepare(const Step& s, int step) {
    const int world = table_.geometry.world;
    const size_t out = s.collective == Collective::kAllGather ? s.count * world : s.count;
    in_heap_ = s.in_heap && (table_.rank + step) % 2 == 0;
    private_.assign(std::max<size_t>(out, 1), -1);
    in_ = in_heap_ ? reinterpret_cast<int32_t*>(table_.heap(table_.rank)) : private_.data();
    const bool block = s.collective == Collective::kAllGather;  // in place: the input is the own block of the output
    out_ = in_;
    if (block) in_ += table_.rank * s.count;
    for (size_t i = 0; i < s.count; ++i) in_[i] = value(step, table_.rank, i);
  }

  CallRecord record(const Step& s, int step) const {
    const auto offset = [&](const int32_t* p) {
      return in_heap_ ? static_cast<uint64_t>(reinterpret_cast<const std::byte*>(p) - table_.heap(table_.rank))
                      : kNotMapped;
    };
    return {static_cast<uint64_t>(step),
            s.count,
            offset(in_),
            offset(out_),
            table_.geometry.world - 1,
            s.collective,
            DType::kInt32,
            ReduceOp::kSum,
            s.algorithm,
            0};
  }

  void run_step(Exec& exec, const Step& s, int channel, WindowState& state, int step) {
    const int world = table_.geometry.world;
    const CallRecord mine = record(s, step);
    std::vector<CallRecord> records(world);
    Operation op{
        reinterpret_cast<std::byte*>(in_),     reinterpret_cast<std::byte*>(out_), sizeof(int32_t), table_.rank, world,
        cut(mine, table_.geometry, channel, 2)};
    if (s.collective == Collective::kReduceScatter) op.out += table_.rank * (s.count / world) * sizeof(int32_t);
    Window<Exec> w(exec, op, table_, channel, state, records.data(), mine);
    const auto enter = [&] {
      if (exec.leader()) table_.barrier_cell(table_.rank, channel, state.epoch + 1).record = mine;
      if (!w.barrier()) return false;
      for (int r = 0; r < world; ++r) {
        records[r] = table_.barrier_cell(r, channel, state.epoch).record;
        CHECK(same_call(records[r], mine));
      }
      return true;
    };
    if (s.algorithm == Algorithm::kRing || s.algorithm == Algorithm::kTree) {
      enter();
      Channel<Exec> c(exec, op, table_.geometry.link_slots, table_.geometry.link_bytes);
      if (s.algorithm == Algorithm::kRing) run_channel(c, links_[channel].ring);
      if (s.algorithm == Algorithm::kTree) run_channel(c, links_[channel].tree);
    } else if (s.collective == Collective::kBroadcast) {
      run_window<Broadcast>(w, enter);
    } else if (s.collective == Collective::kAllGather) {
      run_window<AllGather>(w, enter);
    } else if (s.collective == Collective::kReduceScatter) {
      run_window<ReduceScatter>(w, enter);
    } else if (s.algorithm == Algorithm::kTwoShot) {
      run_window<TwoShotAllReduce>(w, enter);
    } else {
      run_window<OneShotAllReduce>(w, enter);
    }
  }

  void verify(const Step& s, int step) const {
    const int world = table_.geometry.world;
    size_t count = s.count;
    const int32_t* out = out_;
    if (s.collective == Collective::kAllGather) count *= world;
    if (s.collective == Collective::kReduceScatter) {
      count /= world;
      out += table_.rank * count;
    }
    size_t wrong = 0;
    for (size_t i = 0; i < count; ++i) wrong += out[i] != expected(s, step, world, table_.rank, i);
    CHECK_EQ(wrong, size_t{0});
  }

  PeerTable table_;
  HostThreadGroup group_;
  std::deque<ChannelLinks> links_;
  bool in_heap_ = false;
  std::vector<int32_t> private_;
  int32_t *in_ = nullptr, *out_ = nullptr;
};

std::vector<Step> all_steps(int world) {
  std::vector<Step> steps;
  for (const size_t count : {size_t{0}, size_t{1}, size_t{131}, size_t{1500}}) {
    for (const bool in_heap : {false, true}) {
      for (const Algorithm a : {Algorithm::kOneShot, Algorithm::kTwoShot, Algorithm::kRing, Algorithm::kTree}) {
        steps.push_back({Collective::kAllReduce, a, count, in_heap});
      }
      steps.push_back({Collective::kBroadcast, Algorithm::kDirect, count, in_heap});
      steps.push_back({Collective::kAllGather, Algorithm::kDirect, count, in_heap});
      steps.push_back({Collective::kReduceScatter, Algorithm::kDirect, count * world, in_heap});
    }
  }
  return steps;
}

}  // namespace

int main() {
  for (int world = 2; world <= 8; ++world) {
    World memory(world);
    const std::vector<Step> steps = all_steps(world);
    std::deque<Rank> ranks;
    for (int r = 0; r < world; ++r) ranks.emplace_back(memory, r);
    std::vector<std::thread> threads;
    for (Rank& rank : ranks) threads.emplace_back([&] { rank.run(steps); });
    for (std::thread& t : threads) t.join();
  }
  return check::report();
}
