// How each collective is cut for each algorithm: what a round and a chunk are, given the sizes of slots and link
// buffers.
#pragma once

#include "core/layout.h"
#include "core/partition.h"
#include "core/record.h"
#include "core/words.h"

namespace pycoll {

PYCOLL_HD Partition cut(const CallRecord& r, const Geometry& g, int channel, int channels) {
  const size_t element = size_of(r.dtype);
  const size_t slot = g.slot_bytes / element;                      // elements of a slot,
  const size_t place = g.place_bytes() / element;                  // of one rank's place in it,
  const size_t buffer = g.link_bytes / accumulator_size(r.dtype);  // of a link buffer
  const Span share = channel_share(r.count, channel, channels);
  switch (r.collective) {
    case Collective::kReduceScatter:
    case Collective::kScatter: {
      const size_t block = r.count / g.world;
      return {channel_share(block, channel, channels), place, 1, block};
    }
    case Collective::kAllGather:
    case Collective::kGather:
      return {share, slot, 1, r.count};
    case Collective::kReduce:
      return {share, place, g.world};
    case Collective::kAllToAll:  // a share of nothing: it is cut when the counts are known (core/exchange.h)
      return {share, place, 1};
    default:
      break;
  }
  switch (r.algorithm) {
    case Algorithm::kRing:
      return {share, buffer, g.world};
    case Algorithm::kTree:
      return {share, buffer, 1};
    case Algorithm::kTwoShot:
    case Algorithm::kMultimem:
      return {share, place, g.world};
    case Algorithm::kOneShotLl:
      return {share, word_capacity(g, 1) * kUnitBytes / element / kGrain * kGrain, 1};
    case Algorithm::kTwoShotLl:
      return {share, word_capacity(g, 2) * kUnitBytes / element / kGrain * kGrain, g.world};
    default:
      return {share, slot, 1};
  }
}

}  // namespace pycoll
