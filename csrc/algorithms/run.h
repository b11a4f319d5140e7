// The round loops, one for each family: written once, so that an algorithm only says what happens within a round.
#pragma once

#include "core/channel.h"
#include "core/window.h"
#include "core/words.h"

namespace pycoll {

// publish(0) barrier { combine(k) publish(k+1) barrier collect(k) }: one barrier a round, since the barrier that ends
// round k also announces what round k+1 starts from. `enter` is the first barrier (on channel 0: the entry, which
// compares the records).
template <class Algorithm, class W, class Enter>
PYCOLL_HD bool run_window(W& w, const Enter& enter) {
  w.first_publish();
  w.begin_publish(0);
  Algorithm::publish(w);
  if (!enter()) return false;
  if (Algorithm::all_in_place(w)) w.take_all_at_once();
  const bool ends_with_barrier = Algorithm::kCollects || Algorithm::touches_tensors(w);
  size_t rounds = w.rounds();
  for (size_t k = 0; k < rounds; ++k) {
    w.begin_combine(k);
    Algorithm::combine(w);
    if constexpr (requires { typename Algorithm::LearnsRounds; }) rounds = w.rounds();
    if (k + 1 < rounds) {
      w.begin_publish(k + 1);
      Algorithm::publish(w);
    }
    if ((k + 1 < rounds || ends_with_barrier) && !w.barrier()) return false;
    if (Algorithm::kCollects) {
      w.begin_combine(k);
      Algorithm::collect(w);
    }
  }
  return true;
}

// Exchanges of words, one a round. The rank announces its call in the cell of a barrier for which it does not wait: a
// rank that calls something else finds it there.
template <class Algorithm, class Exec>
PYCOLL_HD bool run_words(Exec& exec, const Operation& op, const PeerTable& table, int channel, WindowState& state,
                         const CallRecord& mine) {
  const uint64_t epoch = ++state.epoch;
  if (exec.leader()) {
    Cell& cell = table.barrier_cell(op.rank, channel, epoch);
    cell.record = mine;
    exec.post(cell, epoch);
  }
  Words<Exec> w(exec, op, table, channel, state, mine, Algorithm::kAreas);
  const size_t rounds = w.rounds();
  for (size_t k = 0; k < rounds; ++k) {
    if (!w.begin(k)) return false;
    Algorithm::exchange(w);
    if (!w.end()) return false;
  }
  return true;
}

// { reduce_half(k) gather_half(k - lag) }: the reduce half may run `lag` rounds ahead, so that a tree's leaves do not
// wait for the root.
template <class Algorithm, class Exec>
PYCOLL_HD void run_channel(Channel<Exec>& c, const Algorithm& algorithm) {
  const size_t rounds = c.rounds(), lag = algorithm.lag(c);
  for (size_t k = 0; k < rounds + lag; ++k) {
    if (k < rounds) {
      c.begin(k);
      algorithm.reduce_half(c);
    }
    if (k >= lag) {
      c.begin(k - lag);
      algorithm.gather_half(c);
    }
  }
}

}  // namespace pycoll
