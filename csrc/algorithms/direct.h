// The collectives over everybody's memory that all_reduce is not: the units that two-shot fuses, and what has a root.
//
// reduce-scatter: publish the other ranks' blocks, barrier, each rank adds its own block of all ranks in rank order.
// all-gather:     publish the own block, barrier, each rank copies all blocks.
// gather:         the same, but only the root copies.
// scatter:        the root publishes the other ranks' blocks, barrier, each rank copies its own.
// broadcast:      the root publishes, barrier, the others copy.
// reduce:         two-shot, of which only the root collects (algorithms/two_shot.h): all ranks share the additions.
// All ranks wait on all, as in every barrier, also where there is a root: it needs no credits.
// Each ends with a barrier only if a tensor was read where it lies (csrc/README.md, W6).
#pragma once

#include "core/window.h"

namespace pycoll {

struct ReduceScatter {
  static constexpr bool kCollects = false;
  template <class W>
  PYCOLL_HD static bool all_in_place(const W& w) {
    return w.count_ranks([&](int r) { return w.input_mapped(r); }) == w.world();
  }
  template <class W>
  PYCOLL_HD static bool touches_tensors(const W& w) {
    return w.count_ranks([&](int r) { return w.input_mapped(r); }) > 0;
  }

  template <class W>
  PYCOLL_HD static void publish(W& w) {
    for (int i = 1; i < w.world(); ++i) w.stage_chunk((w.rank() + i) % w.world());
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.reduce_chunk(w.rank(), /*out_shift=*/w.rank() * w.block(), Receivers::kOwner);
  }
  template <class W>
  PYCOLL_HD static void collect(W&) {}
};

struct AllGather : ReduceScatter {
  template <class W>
  PYCOLL_HD static void publish(W& w) {
    w.stage_own();
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    for (int i = 0; i < w.world(); ++i) {
      const int r = (w.rank() + i) % w.world();
      w.copy_block(r, r);
    }
  }
};

struct Gather : AllGather {
  template <class W>
  PYCOLL_HD static void publish(W& w) {
    if (w.rank() != w.root()) w.stage_own();
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    if (w.rank() == w.root()) AllGather::combine(w);
  }
};

struct Broadcast {
  static constexpr bool kCollects = false;
  template <class W>
  PYCOLL_HD static bool all_in_place(const W& w) {
    return w.input_mapped(w.root());
  }
  template <class W>
  PYCOLL_HD static bool touches_tensors(const W& w) {
    return w.input_mapped(w.root());
  }

  template <class W>
  PYCOLL_HD static void publish(W& w) {
    if (w.rank() == w.root()) w.stage_own();
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    if (w.rank() != w.root()) w.copy_block(w.root(), 0);
  }
  template <class W>
  PYCOLL_HD static void collect(W&) {}
};

struct Scatter : Broadcast {
  template <class W>
  PYCOLL_HD static void publish(W& w) {
    if (w.rank() == w.root()) ReduceScatter::publish(w);
  }
  template <class W>
  PYCOLL_HD static void combine(W& w) {
    w.take_chunk(w.root(), w.rank());
  }
};

}  // namespace pycoll
