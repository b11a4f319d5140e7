// All-to-all, of any number of elements for each pair of ranks.
//
// Round 0 exchanges counts (core/exchange.h):
//   publish: what this rank sends to each and expects of each.        -- barrier --
//   combine: all read all of them.
// Each later round:
//   publish: each rank copies a chunk for each other rank into its slot; a tensor in the shared heap is read where it
//     lies.                                                           -- barrier --
//   combine: each rank copies what the others have for it.
// It ends with a barrier only if a tensor was read where it lies (csrc/README.md, W6).
#pragma once

#include "algorithms/direct.h"
#include "core/exchange.h"

namespace pycoll {

struct AllToAll : ReduceScatter {  // which it resembles in what it reads in place
  using LearnsRounds = void;

  template <class X>
  PYCOLL_HD static void publish(X& x) {
    if (x.tells_counts()) return x.stage_counts();
    for (int i = 1; i < x.world(); ++i) x.stage_for((x.rank() + i) % x.world());
  }
  template <class X>
  PYCOLL_HD static void combine(X& x) {
    if (x.tells_counts()) return x.take_counts();
    for (int i = 0; i < x.world(); ++i) x.take_from((x.rank() + i) % x.world());
  }
};

}  // namespace pycoll
