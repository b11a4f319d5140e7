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

// kDirect stands for the one way in which the other collectives run. The low-latency (LL) variants and multimem are for
// GPUs alone.
enum class Algorithm : uint8_t { kOneShot, kTwoShot, kRing, kTree, kOneShotLl, kTwoShotLl, kMultimem, kDirect };

constexpr const char* name(Algorithm a) {
  constexpr const char* names[] = {"one_shot",    "two_shot",    "ring",     "tree",
                                   "one_shot_ll", "two_shot_ll", "multimem", "direct"};
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

// What same_call compares, in 32 bits.
PYCOLL_HD uint32_t digest(const CallRecord& r) {
  const uint64_t kinds = static_cast<uint64_t>(r.collective) << 24 | static_cast<uint64_t>(r.dtype) << 16 |
                         static_cast<uint64_t>(r.op) << 8 | static_cast<uint64_t>(r.algorithm);
  uint64_t hash = 14695981039346656037u;  // FNV-1a, over 64-bit words
  for (const uint64_t part : {r.sequence, r.count, static_cast<uint64_t>(r.root), kinds, r.shape}) {
    hash = (hash ^ part) * 1099511628211u;
  }
  return static_cast<uint32_t>(hash >> 32);
}

// Whether two ranks make the same call. Where their tensors lie does not matter.
PYCOLL_HD bool same_call(const CallRecord& a, const CallRecord& b) {
  return a.sequence == b.sequence && a.count == b.count && a.root == b.root && a.collective == b.collective &&
         a.dtype == b.dtype && a.op == b.op && a.algorithm == b.algorithm && a.shape == b.shape;
}

}  // namespace pycoll
