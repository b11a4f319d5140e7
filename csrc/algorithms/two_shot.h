// Two-shot all-reduce: reduce-scatter and all-gather fused, for everything larger (Rabenseifner's split, over memory
// all ranks can read).
//
// A round has one chunk a rank; rank r owns chunk r.
//   publish: each rank copies the chunks of the others into its slot; a tensor in the shared heap is read where it
//     lies.
//       -- barrier --
//   combine: the owner reads its chunk of all ranks, adds in rank order, and writes the result to its output, into the
//     outputs of the ranks whose tensors are in the heap, and into its slot for the rest.
//       -- barrier --
//   collect: each rank whose output is private copies the other chunks from their owners' slots.
// With all tensors in the heap there is nothing to publish or collect, and the whole tensor is one round between two
// barriers. Each element is read and written by its owner alone, so it is right in place. Bits: rank order, as
// one-shot.
#pragma once

#include "core/window.h"

namespace pycoll {

struct TwoShotAllReduce {
  static constexpr bool kCollects = true;
  template <class W>
  PYCOLL_HD static bool all_in_place(const W& w) {
    return w.count_ranks([&](int r) { return w.input_mapped(r) && w.output_mapped(r); }) == w.world();
  }
  template <class W>
  PYCOLL_HD static bool touches_tensors(const W&) {
    return true;
  }

  template <class W>
  PYCOLL_HD static void publish(W& w) {
    for (int i = 1; i < w.world(); ++i) w.stage_chunk((w.rank() + i) % w.world());
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.reduce_chunk(w.rank(), /*out_shift=*/0, Receivers::kAll);
  }
  template <class W>
  PYCOLL_HD static void collect(W& w) {
    for (int i = 1; i < w.world(); ++i) w.collect_chunk((w.rank() + i) % w.world());
  }
};

// Reduce: the same, for the root alone.
struct TwoShotReduce : TwoShotAllReduce {
  template <class W>
  PYCOLL_HD static bool all_in_place(const W& w) {
    return w.output_mapped(w.root()) && w.count_ranks([&](int r) { return w.input_mapped(r); }) == w.world();
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.reduce_chunk(w.rank(), /*out_shift=*/0, Receivers::kRoot);
  }
  template <class W>
  PYCOLL_HD static void collect(W& w) {
    if (w.rank() == w.root()) TwoShotAllReduce::collect(w);
  }
};

}  // namespace pycoll
