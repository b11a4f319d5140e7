// Shards: each rank works on its shard of what all ranks hold where their peers map it. The calls of gradient buckets.
//
//       -- barrier --
//   combine: rank r reads shard r of all ranks' inputs, and writes shard r of all ranks' outputs, or of some, or of none.
//       -- barrier --
// Nothing is staged, so one round is enough. What is done to a shard is the executor's: work(in, out), where each rank's
// input and output lie (out: null where it has none).
#pragma once

#include "core/window.h"

namespace pycoll {

struct Shards {
  static constexpr bool kCollects = false;
  template <class W>
  PYCOLL_HD static bool all_in_place(const W&) {
    return true;
  }
  template <class W>
  PYCOLL_HD static bool touches_tensors(const W&) {
    return true;
  }

  template <class W>
  PYCOLL_HD static void publish(W&) {}
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.work_on_shard();
  }
  template <class W>
  PYCOLL_HD static void collect(W&) {}
};

}  // namespace pycoll
