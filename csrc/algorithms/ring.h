// Ring all-reduce (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
//
// A round holds one chunk a rank. Every rank talks to its two neighbours only, and all links are busy at once.
//   reduce half: W-1 steps. Chunk r starts at rank r and goes round the ring; each rank adds its own part. The rank
//     before r completes it.
//   gather half: W-1 steps. The finished chunks go round once more and each rank copies them to its output.
// Traffic: each rank sends and receives 2 (W-1)/W of the tensor, which is the least possible. Latency: 2 (W-1) steps.
// Bits: the same on all ranks and in all runs; a chunk is summed in ring order from its own rank on, so the order
// depends on the chunking.
#pragma once

#include "core/channel.h"

namespace pycoll {

struct RingAllReduce {
  Links ring;

  template <class C>
  PYCOLL_HD static size_t lag(const C&) {
    return 0;
  }

  template <class C>
  PYCOLL_HD void reduce_half(C& c) const {
    const int world = c.world();
    c.send(ring, chunk(c, 0));
    for (int s = 1; s < world - 1; ++s) c.recv_reduce_send(ring, chunk(c, s));
    c.recv_reduce_copy_send(ring, chunk(c, world - 1));
  }

  template <class C>
  PYCOLL_HD void gather_half(C& c) const {
    const int world = c.world();
    for (int s = 0; s < world - 2; ++s) c.recv_copy_send(ring, chunk(c, s));
    c.recv_copy(ring, chunk(c, world - 2));
  }

 private:
  template <class C>
  PYCOLL_HD static int chunk(const C& c, int back) {
    return (c.rank() - back + 2 * c.world()) % c.world();
  }
};

}  // namespace pycoll
