// The connections of one channel of one rank, for ring and tree, from the table of segments and the topology.
#pragma once

#include "algorithms/ring.h"
#include "algorithms/tree.h"
#include "core/layout.h"
#include "core/topology.h"

namespace pycoll {

struct ChannelLinks {
  Connection ring_recv, ring_send, up_recv[2], up_send, down_recv, down_send[2];
  uint64_t counts[8] = {};  // messages each connection has carried, as this end knows (L2)
  RingAllReduce ring;
  TreeAllReduce tree;

  PYCOLL_HD ChannelLinks(const PeerTable& t, int channel) {
    uint64_t* count = counts;
    // The connection of `kind` into `receiver`, as this rank sees it; `child` as in PeerTable::credit_cell.
    const auto connect = [&](LinkKind kind, int sender, int receiver, int child) {
      return Connection{&t.head_cell(receiver, channel, kind), &t.credit_cell(sender, channel, kind, child),
                        t.link_buffers(receiver, channel, kind), count++, sender == t.rank ? receiver : sender};
    };
    const RingNeighbours r = ring_neighbours(t.rank, t.geometry.world);
    ring_recv = connect(kRingLink, r.previous, t.rank, 0);
    ring_send = connect(kRingLink, t.rank, r.next, 0);
    ring.ring = {&ring_recv, 1, &ring_send, 1};

    const TreeNeighbours n = tree_neighbours(t.rank, t.geometry.world, /*mirror=*/channel % 2 == 1);
    const int parents = n.parent >= 0 ? 1 : 0;
    for (int i = 0; i < n.child_count; ++i) {
      up_recv[i] = connect(i == 0 ? kTreeUp0 : kTreeUp1, n.children[i], t.rank, 0);
      down_send[i] = connect(kTreeDown, t.rank, n.children[i], i);
    }
    if (parents) {
      up_send = connect(n.child_index == 0 ? kTreeUp0 : kTreeUp1, t.rank, n.parent, 0);
      down_recv = connect(kTreeDown, n.parent, t.rank, n.child_index);
    }
    tree.up = {up_recv, n.child_count, &up_send, parents};
    tree.turn = {up_recv, n.child_count, down_send, n.child_count};
    tree.down = {&down_recv, parents, down_send, n.child_count};
  }
  template <class Algorithm>
  PYCOLL_HD const Algorithm& of() const {
    if constexpr (std::is_same_v<Algorithm, RingAllReduce>) {
      return ring;
    } else {
      return tree;
    }
  }
  ChannelLinks(const ChannelLinks&) = delete;  // the algorithms point into it
};

}  // namespace pycoll
