// A cell: one line of shared memory with one counter, one writer, and room for the record of a call.
//
// The counter only grows (64 bits never wrap). Whoever has seen the value n posted has also seen all that the poster
// wrote before.
#pragma once

#include <cstdint>

#include "core/record.h"

namespace pycoll {

struct alignas(128) Cell {
  uint64_t value;     // through core/atomic.h only
  uint32_t sleepers;  // how many threads sleep until the value moves (CPU)
  CallRecord record;  // plain data, published by the post of a collective's first barrier
};
static_assert(sizeof(Cell) == 128 && offsetof(Cell, record) + sizeof(CallRecord) <= 64,
              "flag and record share a cache line; two cells never do, nor a pair of prefetched lines");

}  // namespace pycoll
