// One call on one channel of one rank: which algorithm runs. The same for every device.
#pragma once

#include "algorithms/all_to_all.h"
#include "algorithms/cut.h"
#include "algorithms/direct.h"
#include "algorithms/links.h"
#include "algorithms/low_latency.h"
#include "algorithms/multimem.h"
#include "algorithms/one_shot.h"
#include "algorithms/run.h"
#include "algorithms/shards.h"
#include "algorithms/two_shot.h"

namespace pycoll {

// The first barrier of a call on a GPU, where each channel enters by itself. Afterwards `records` [world], which all
// threads of the group share, holds what the ranks call; false if they do not all call the same, or one has failed.
template <class Exec>
PYCOLL_HD bool enter_comparing(Exec& exec, Window<Exec>& w, const PeerTable& table, int channel,
                               const WindowState& state, CallRecord* records, const CallRecord& mine) {
  if (exec.leader()) table.barrier_cell(table.rank, channel, state.epoch + 1).record = mine;
  if (!w.barrier()) return false;
  bool same = true;
  for (size_t r = exec.thread(); r < static_cast<size_t>(w.world()); r += exec.size()) {
    records[r] = table.barrier_cell(static_cast<int>(r), channel, state.epoch).record;
    same &= same_call(records[r], mine);
  }
  if (exec.sync(same)) return true;
  if (exec.leader()) exec.report_mismatch(table, channel, state.epoch);
  return false;
}

// A world of one: the result is the input.
template <class Exec>
PYCOLL_HD bool run_alone(Exec& exec, const Operation& op, Span s, const CallRecord& mine) {
  void* dst = op.out + s.offset * op.element_bytes;
  const void* src = op.in + s.offset * op.element_bytes;
  if (reduces(mine.collective)) {
    exec.combine({&dst, 1, &src, 1, 0, true, 1, s.length});
  } else if (dst != src) {
    exec.copy(dst, src, s.length * op.element_bytes);
  }
  return exec.sync(true);
}

// Which algorithm a call runs, as a type: f(TypeTag<Algorithm>{}).
struct BarrierOnly {};
template <class F>
constexpr decltype(auto) dispatch_call(Collective collective, Algorithm algorithm, F&& f) {
  switch (collective) {
    case Collective::kBarrier:
      return f(TypeTag<BarrierOnly>{});
    case Collective::kBroadcast:
      return f(TypeTag<Broadcast>{});
    case Collective::kAllGather:
      return f(TypeTag<AllGather>{});
    case Collective::kReduceScatter:
      return f(TypeTag<ReduceScatter>{});
    case Collective::kReduce:
      return f(TypeTag<TwoShotReduce>{});
    case Collective::kGather:
      return f(TypeTag<Gather>{});
    case Collective::kScatter:
      return f(TypeTag<Scatter>{});
    case Collective::kAllToAll:
      return f(TypeTag<AllToAll>{});
    case Collective::kReduceBucket:
    case Collective::kMeasureBucket:
    case Collective::kUpdateBucket:
      return f(TypeTag<Shards>{});
    case Collective::kAllReduce:
      break;
  }
  switch (algorithm) {
    case Algorithm::kTwoShot:
      return f(TypeTag<TwoShotAllReduce>{});
    case Algorithm::kRing:
      return f(TypeTag<RingAllReduce>{});
    case Algorithm::kTree:
      return f(TypeTag<TreeAllReduce>{});
    case Algorithm::kOneShotLl:
      return f(TypeTag<OneShotLlAllReduce>{});
    case Algorithm::kTwoShotLl:
      return f(TypeTag<TwoShotLlAllReduce>{});
    case Algorithm::kMultimem:
      return f(TypeTag<MultimemAllReduce>{});
    default:
      return f(TypeTag<OneShotAllReduce>{});
  }
}

// What an algorithm is written in.
enum class Family { kWindow, kChannel, kWords, kExchange };
template <class Algorithm>
constexpr Family kFamily = Family::kWindow;
template <>
inline constexpr Family kFamily<RingAllReduce> = Family::kChannel;
template <>
inline constexpr Family kFamily<TreeAllReduce> = Family::kChannel;
template <>
inline constexpr Family kFamily<OneShotLlAllReduce> = Family::kWords;
template <>
inline constexpr Family kFamily<TwoShotLlAllReduce> = Family::kWords;
template <>
inline constexpr Family kFamily<AllToAll> = Family::kExchange;

template <class Exec>
constexpr bool kWorksOnShards = requires(Exec& exec) { exec.work(nullptr, nullptr); };

// `enter(window)` is the call's first barrier, after which the records of all ranks may be read; false: give up.
// `op.partition` is set here. Words and multimem are for executors that have them.
template <class Algorithm, class Exec, class Enter>
PYCOLL_HD bool run_call(Exec& exec, Operation op, const PeerTable& table, int channel, int channels,
                        const ChannelLinks& links, WindowState& state, const CallRecord* records,
                        const CallRecord& mine, const Enter& enter) {
  op.partition = cut(mine, table.geometry, channel, channels);
  Window<Exec> w(exec, op, table, channel, state, records, mine);
  if constexpr (kFamily<Algorithm> == Family::kWords) {  // right in a world of one as well, and without the large loops
    return run_words<Algorithm>(exec, op, table, channel, state, mine);
  } else if constexpr (std::is_same_v<Algorithm, Shards>) {
    if constexpr (kWorksOnShards<Exec>) {
      return run_window<Algorithm>(w, [&] { return enter(w); });
    } else {
      return false;  // nobody asks for it there
    }
  } else if (op.world == 1) {
    const size_t count = op.send_counts ? op.send_counts[0] : mine.count;
    return run_alone(exec, op, channel_share(count, channel, channels), mine);
  } else if constexpr (std::is_same_v<Algorithm, BarrierOnly>) {
    return enter(w);
  } else if constexpr (kFamily<Algorithm> == Family::kChannel) {
    if (!enter(w)) return false;
    Channel<Exec> c(exec, op, table.geometry.link_slots, table.geometry.link_bytes);
    run_channel(c, links.of<Algorithm>());
    return exec.sync(true);
  } else if constexpr (kFamily<Algorithm> == Family::kExchange) {
    Exchange<Exec> x(exec, op, table, channel, channels, state, records, mine);
    return run_window<Algorithm>(x, [&] { return enter(x); });
  } else {
    return run_window<Algorithm>(w, [&] { return enter(w); });
  }
}

}  // namespace pycoll
