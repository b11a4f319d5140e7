// What one block of a collective's kernel does: the part of the kernel that needs no GPU.
#pragma once

#include "algorithms/call.h"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

// For the rank `call.ranks[index]` on one channel. `records` [world] is shared by the threads of the block. `counts`: null
// but for an all-to-all.
template <Family kOfKernel, class Exec>
PYCOLL_HD void run_block(Exec& exec, const DeviceCall& call, const DeviceCounts* counts, int index, int channel,
                         CallRecord* records) {
  const DeviceRank& rank = call.ranks[index];
  const int world = rank.table.geometry.world;
  const bool all_here = call.ranks_here == world;
  // In one process a pointer serves all ranks: each tensor is "in the heap", at its distance from it.
  for (size_t r = exec.thread(); all_here && r < static_cast<size_t>(world); r += exec.size()) {
    const auto offset = [&](const void* p) {
      return p == nullptr
                 ? kNotMapped
                 : static_cast<uint64_t>(static_cast<const std::byte*>(p) - rank.table.heap(static_cast<int>(r)));
    };
    records[r] = call.record;
    records[r].in_offset = offset(call.in[r]);
    records[r].out_offset = offset(call.out[r]);
  }
  exec.sync(true);
  const CallRecord& mine = all_here ? records[rank.table.rank] : call.record;
  const Operation op{static_cast<const std::byte*>(call.in[index]),
                     static_cast<std::byte*>(call.out[index]),
                     size_of(mine.dtype),
                     rank.table.rank,
                     world,
                     {},
                     counts ? counts->send[index] : nullptr,
                     counts ? counts->recv[index] : nullptr};
  WindowState state = rank.windows[channel];  // every thread keeps its own copy
  const auto enter = [&](Window<Exec>& w) {
    return all_here ? w.barrier() : enter_comparing(exec, w, rank.table, channel, state, records, mine);
  };
  dispatch_call(mine.collective, mine.algorithm, [&](auto tag) {
    using A = typename decltype(tag)::type;
    if constexpr (kFamily<A> == kOfKernel) {
      run_call<A>(exec, op, rank.table, channel, call.channels, rank.links[channel], state, records, mine, enter);
    }
  });
  exec.sync(true);
  if (exec.leader()) rank.windows[channel] = state;
}

}  // namespace pycoll::cuda_device
