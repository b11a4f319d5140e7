// Two-shot all-reduce in the switch that joins the GPUs (NVLink SHARP, "NVLS"; PTX `multimem`), for large sums.
//
// A round has one chunk a rank; rank r owns chunk r.
//   publish: each rank copies its whole round into its slot.                                             -- barrier --
//   combine: the owner asks the switch for the sum of its chunk of all slots, and has it write that into all of them.
//                                                                                                         -- barrier --
//   collect: each rank copies the round out of its own slot.
// Traffic: each rank sends and receives the tensor once, half of what any algorithm without the switch needs. Bits: the
// same on all ranks; the switch adds in an order of its own (16-bit types in fp32, rounded once). Only sums.
#pragma once

#include "core/window.h"

namespace pycoll {

struct MultimemAllReduce {
  using OnlyOnGpus = void;
  static constexpr bool kCollects = true;
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
    for (int c = 0; c < w.world(); ++c) w.stage_chunk_always(c);
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.reduce_in_switch(w.rank());
  }
  template <class W>
  PYCOLL_HD static void collect(W& w) {
    for (int c = 0; c < w.world(); ++c) w.collect_own(c);
  }
};

}  // namespace pycoll
