// Who talks to whom: the ring's and the tree's neighbours, as pure functions of rank and world size.
#pragma once

#include "core/platform.h"

namespace pycoll {

struct RingNeighbours {
  int previous, next;
};

PYCOLL_HD RingNeighbours ring_neighbours(int rank, int world) {
  return {(rank + world - 1) % world, (rank + 1) % world};
}

struct TreeNeighbours {
  int parent;       // -1 at the root
  int children[2];  // the first `child_count` are there
  int child_count;
  int child_index;  // which child of its parent this rank is
};

// The binary tree in which rank r has the children 2r+1 and 2r+2. Its mirror counts ranks from the other end, so that
// the leaves of the one are the inner ranks of the other and two channels together load all ranks alike (Sanders et
// al., "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009).
PYCOLL_HD TreeNeighbours tree_neighbours(int rank, int world, bool mirror) {
  const auto flip = [&](int r) { return mirror ? world - 1 - r : r; };
  const int place = flip(rank);
  TreeNeighbours t{-1, {-1, -1}, 0, 0};
  if (place > 0) {
    t.parent = flip((place - 1) / 2);
    t.child_index = (place - 1) % 2;
  }
  for (int child = 2 * place + 1; child <= 2 * place + 2 && child < world; ++child) {
    t.children[t.child_count++] = flip(child);
  }
  return t;
}

}  // namespace pycoll
