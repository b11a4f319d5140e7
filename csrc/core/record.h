// What a rank says it is calling: written beside the flag of a collective's first barrier, compared by every peer.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycoll {

enum class Collective : uint8_t {
  kAllReduce,
  kReduce,
  kBroadcast,
  kAllGather,
  kGather,
  kReduceScatter,
  kScatter,
  kAllToAll,
  kReduceBucket,
  kMeasureBucket,
  kUpdateBucket,
  kBarrier
};

constexpr const char* name(Collective c) {
  constexpr const char* names[] = {"all_reduce",    "reduce",         "broadcast",     "all_gather",
                                   "gather",        "reduce_scatter", "scatter",       "all_to_all",
                                   "reduce_bucket", "measure_bucket", "update_bucket", "barrier"};
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

constexpr bool has_root(Collective c) {
  return c == Collective::kReduce || c == Collective::kBroadcast || c == Collective::kGather ||
         c == Collective::kScatter;
}
constexpr bool reduces(Collective c) {
  return c == Collective::kAllReduce || c == Collective::kReduce || c == Collective::kReduceScatter;
}

// Work on shards of a gradient bucket (algorithms/shards.h).
constexpr bool of_bucket(Collective c) {
  return c == Collective::kReduceBucket || c == Collective::kMeasureBucket || c == Collective::kUpdateBucket;
}

constexpr uint64_t kNotMapped = ~uint64_t{0};  // an offset that says: not in my heap, read it from my slot

struct CallRecord {
  uint64_t sequence;    // how many collectives this rank has begun before
  uint64_t count;       // elements: see elements_of
  uint64_t in_offset;   // where the input lies in this rank's heap, or kNotMapped; ranks may differ
  uint64_t out_offset;  // the same for the output
  int32_t root;         // 0 where there is none
  Collective collective;
  DType dtype;
  ReduceOp op;
  Algorithm algorithm;
  uint64_t shape;  // what else the caller wants compared, as one number: sizes, the type behind bytes
};

// Elements of a rank's input and output, from what all ranks agree on: `count` is that of the tensor (all-reduce, reduce,
// broadcast), of one rank's block (all-gather, gather), or of all blocks (reduce-scatter, scatter). In an all-to-all
// ranks differ, and it is 0. Rooted collectives use some of it on the root alone.
struct InOut {
  uint64_t in, out;
};
PYCOLL_HD InOut elements_of(Collective c, uint64_t count, int world) {
  const bool gathers = c == Collective::kAllGather || c == Collective::kGather;
  const bool scatters = c == Collective::kReduceScatter || c == Collective::kScatter;
  return {count, gathers ? count * world : scatters ? count / world : count};
}

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
