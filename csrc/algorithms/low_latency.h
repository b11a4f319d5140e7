// One-shot and two-shot all-reduce in words: for tensors so small that a barrier is what costs.
//
// one-shot: each rank pushes its elements to all others, and adds what it receives, in rank order, to its own.
// two-shot: each rank pushes chunk r to rank r; rank r adds chunk r of all, in rank order, and pushes the sum to all others.
// No barrier: a word says itself that it is there. Each rank reads its own memory only; in place is right, since the
// thread that overwrites a unit has pushed it before. Traffic: twice that of the algorithms without words. Bits: rank
// order, as theirs.
#pragma once

#include "core/words.h"

namespace pycoll {

struct OneShotLlAllReduce {
  using OnlyOnGpus = void;
  static constexpr int kAreas = 1;
  template <class W>
  PYCOLL_HD static void exchange(W& w) {
    for (int i = 1; i < w.world(); ++i) w.push((w.rank() + i) % w.world(), w.chunk(0));
    w.reduce(w.chunk(0), /*share=*/false);
  }
};

struct TwoShotLlAllReduce {
  using OnlyOnGpus = void;
  static constexpr int kAreas = 2;
  template <class W>
  PYCOLL_HD static void exchange(W& w) {
    const auto other = [&](int i) { return (w.rank() + i) % w.world(); };
    for (int i = 1; i < w.world(); ++i) w.push(other(i), w.chunk(other(i)));
    w.reduce(w.chunk(w.rank()), /*share=*/true);
    for (int i = 1; i < w.world(); ++i) w.fetch(other(i), w.chunk(other(i)));
  }
};

}  // namespace pycoll
