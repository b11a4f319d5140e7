// What a rank does with its shard of what all ranks hold in their heaps: between the two barriers of algorithms/shards.h.
#pragma once

namespace pycoll::cpu {

class ShardWork {
 public:
  virtual ~ShardWork() = default;
  // [world] each: where the ranks' inputs and outputs lie here; an output is null where there is none.
  virtual void run(const void* const* in, void* const* out) const = 0;
};

}  // namespace pycoll::cpu
