// Tree all-reduce: a binary tree, and on odd channels its mirror, so that all ranks carry alike (two-tree algorithm,
// Sanders et al., 2009).
//
// A round is one chunk, the same for all ranks.
//   reduce half: from the leaves up. Each rank adds its children's sums and its own part, and sends the sum to its
//     parent; the root completes it.
//   gather half: from the root down. Each rank copies the result to its output and passes it on to its children.
// Latency: 2 log2(W) steps. The reduce half runs some rounds ahead of the gather half, so that both directions are
// busy.
// Bits: the same on all ranks and in all runs; an element is summed in the order of the tree (children, then own),
// which depends on its channel.
#pragma once

#include "core/channel.h"

namespace pycoll {

struct TreeAllReduce {
  Links up, turn, down;  // children -> parent, children -> children (at the root), parent -> children

  template <class C>
  PYCOLL_HD static size_t lag(const C& c) {
    return static_cast<size_t>(c.link_slots() - 1);
  }

  template <class C>
  PYCOLL_HD void reduce_half(C& c) const {
    const bool leaf = up.recv_count == 0, root = up.send_count == 0;
    if (root) {
      c.recv_reduce_copy_send(turn, 0);
    } else if (leaf) {
      c.send(up, 0);
    } else {
      c.recv_reduce_send(up, 0);
    }
  }

  template <class C>
  PYCOLL_HD void gather_half(C& c) const {
    const bool leaf = down.send_count == 0, root = down.recv_count == 0;
    if (root) return;  // it copied and sent as it completed the sum
    if (leaf) {
      c.recv_copy(down, 0);
    } else {
      c.recv_copy_send(down, 0);
    }
  }
};

}  // namespace pycoll
