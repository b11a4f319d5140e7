// One-shot all-reduce: the fewest steps, for small tensors.
//
// A round is as much of the tensor as a slot holds.
//   publish: each rank copies the round of its input into its slot.            -- barrier --
//   combine: each rank reads all slots, adds them in rank order, and writes the whole result to its own output.
// One barrier in all. It reads slots, never tensors, so it is right in place, and needs no barrier at the end: slots
// alternate.
// Traffic: each rank reads W-1 times the tensor. Bits: rank order, the same on all ranks, in all runs, and as two-shot.
#pragma once

#include "core/window.h"

namespace pycoll {

struct OneShotAllReduce {
  static constexpr bool kCollects = false;
  template <class W>
  PYCOLL_HD static bool all_in_place(const W&) {
    return false;
  }
  template <class W>
  PYCOLL_HD static bool touches_tensors(const W&) {
    return false;
  }

  template <class W>
  PYCOLL_HD static void publish(W& w) {
    w.stage_round();
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.reduce_round();
  }
  template <class W>
  PYCOLL_HD static void collect(W&) {}
};

}  // namespace pycoll
