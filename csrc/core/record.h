// What a rank says it is calling: written beside the flag of a collective's first barrier, compared by every peer.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycoll {

enum class Collective : uint8_t { kAllReduce, kBroadcast, kAllGather, kReduceScatter, kBarrier };

constexpr const char* name(Collective c) {
  constexpr const char* names[] = {"all_reduce", "broadcast", "all_gather", "reduce_scatter", "barrier"};
  return names[static_cast<int>(c)];
}

// kDirect stands for the one way in which the other collectives run.
enum class Algorithm : uint8_t { kOneShot, kTwoShot, kRing, kTree, kDirect };

constexpr const char* name(Algorithm a) {
  constexpr const char* names[] = {"one_shot", "two_shot", "ring", "tree", "direct"};
  return names[static_cast<int>(a)];
}

constexpr uint64_t kNotMapped = ~uint64_t{0};  // an offset that says: not in my heap, read it from my slot

struct CallRecord {
  uint64_t sequence;    // how many collectives this rank has begun before
  uint64_t count;       // elements of the input (for broadcast: of the tensor)
  uint64_t in_offset;   // where the input lies in this rank's heap, or kNotMapped; ranks may differ
  uint64_t out_offset;  // the same for the output
  int32_t root;         // broadcast only, else 0
  Collective collective;
  DType dtype;
  ReduceOp op;
  Algorithm algorithm;
  uint64_t shape;  // what else the caller wants compared, as one number: sizes, the type behind bytes
};

// Whether two ranks make the same call. Where their tensors lie does not matter.
PYCOLL_HD bool same_call(const CallRecord& a, const CallRecord& b) {
  return a.sequence == b.sequence && a.count == b.count && a.root == b.root && a.collective == b.collective &&
         a.dtype == b.dtype && a.op == b.op && a.algorithm == b.algorithm && a.shape == b.shape;
}

}  // namespace pycoll
