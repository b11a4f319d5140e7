// How a collective is cut: channels take shares, shares are cut into rounds, rounds into chunks. The only place that
// knows offsets, tails included.
#pragma once

#include <cstddef>

#include "core/platform.h"

namespace pycoll {

constexpr size_t kGrain = 64;  // elements: chunks and shares begin at multiples of a cache line, at any dtype

PYCOLL_HD size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
PYCOLL_HD size_t round_up(size_t a, size_t unit) { return ceil_div(a, unit) * unit; }
PYCOLL_HD size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

struct Span {  // in elements
  size_t offset, length;
};

// The part of [0, count) that channel `channel` of `channels` takes.
PYCOLL_HD Span channel_share(size_t count, int channel, int channels) {
  const size_t share = round_up(ceil_div(count, channels), kGrain);
  const size_t begin = smaller(count, share * channel);
  return {begin, smaller(count, begin + share) - begin};
}

struct Partition {
  Span share;    // of the tensor (all-reduce, broadcast) or of each rank's block of it (all-gather, reduce-scatter)
  size_t chunk;  // elements of a chunk in a full round
  int chunks;    // chunks a round has side by side, or 1 and one a block
  // 0: the chunks of a round lie side by side; else chunk c lies in block c, and blocks are `stride` elements apart.
  size_t stride = 0;

  PYCOLL_HD size_t per_round() const { return stride ? chunk : chunk * chunks; }
  PYCOLL_HD size_t rounds() const { return share.length == 0 ? 1 : ceil_div(share.length, per_round()); }

  // Where chunk `c` of round `round` lies in the tensor. The last round is cut evenly too; it may leave the last chunks
  // empty.
  PYCOLL_HD Span at(size_t round, int c) const {
    const size_t done = smaller(share.length, round * per_round());
    const size_t left = smaller(share.length - done, per_round());
    if (stride) return {c * stride + share.offset + done, left};
    const size_t even = smaller(chunk, round_up(ceil_div(left, chunks), kGrain));
    const size_t begin = smaller(left, even * c);
    return {share.offset + done + begin, smaller(left - begin, even)};
  }

  // The whole of a round (side by side only).
  PYCOLL_HD Span whole(size_t round) const {
    const size_t done = smaller(share.length, round * per_round());
    return {share.offset + done, smaller(share.length - done, per_round())};
  }
};

}  // namespace pycoll
