// All-reduce among ranks that share a GPU: the algorithms of csrc/algorithms, a block for each rank and channel, in one
// cooperative launch.
#include <cuda_runtime.h>

#include "algorithms/cut.h"
#include "algorithms/one_shot.h"
#include "algorithms/run.h"
#include "algorithms/two_shot.h"
#include "cuda/executor.cuh"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

namespace {

__global__ void prepare_kernel(const GroupRank* ranks, int channels) {
  const GroupRank& rank = ranks[blockIdx.x];
  for (int c = 0; c < channels; ++c) new (&rank.links[c]) ChannelLinks(rank.table, c);
}

__global__ void __launch_bounds__(kThreads, 1) all_reduce_kernel(GroupCall call) {
  const GroupRank& rank = call.ranks[blockIdx.y];
  const int channel = static_cast<int>(blockIdx.x);
  // In one process a pointer serves all ranks: each tensor is "in the heap", at its distance from it.
  __shared__ CallRecord records[kMaxRanks];
  for (int r = static_cast<int>(threadIdx.x); r < call.world; r += static_cast<int>(blockDim.x)) {
    const auto offset = [&](const void* p) {
      return static_cast<uint64_t>(static_cast<const std::byte*>(p) - rank.table.heap(r));
    };
    records[r] = call.record;
    records[r].in_offset = offset(call.in[r]);
    records[r].out_offset = offset(call.out[r]);
  }
  __syncthreads();
  const int self = rank.table.rank;
  BlockExecutor exec(call.record.dtype, call.record.op, call.status, call.timeout_ns);
  Operation op{static_cast<const std::byte*>(call.in[self]),
               static_cast<std::byte*>(call.out[self]),
               size_of(call.record.dtype),
               self,
               call.world,
               cut(call.record, rank.table.geometry, channel, call.channels)};
  WindowState state = rank.windows[channel];  // every thread keeps its own copy
  Window<BlockExecutor> window(exec, op, rank.table, channel, state, records, records[self]);
  const auto enter = [&] { return window.barrier(); };
  const auto lane = [&](const auto& algorithm) {
    if (!enter()) return;
    Channel<BlockExecutor> c(exec, op, rank.table.geometry.link_slots, rank.table.geometry.link_bytes);
    run_channel(c, algorithm);
  };
  switch (call.record.algorithm) {
    case Algorithm::kRing:
      lane(rank.links[channel].ring);
      break;
    case Algorithm::kTree:
      lane(rank.links[channel].tree);
      break;
    case Algorithm::kTwoShot:
      run_window<TwoShotAllReduce>(window, enter);
      break;
    default:
      run_window<OneShotAllReduce>(window, enter);
  }
  exec.sync(true);
  if (exec.leader()) rank.windows[channel] = state;
}

}  // namespace

int prepare_group(const GroupRank* ranks, int world, int channels, void* stream) {
  prepare_kernel<<<world, 1, 0, static_cast<cudaStream_t>(stream)>>>(ranks, channels);
  return static_cast<int>(cudaGetLastError());
}

int resident_blocks(int* blocks) {
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, all_reduce_kernel, kThreads, 0);
  }
  *blocks = each * multiprocessors;
  return static_cast<int>(error);
}

int all_reduce_group(const GroupCall& call, void* stream) {
  if (call.world > kMaxRanks) return static_cast<int>(cudaErrorInvalidValue);
  GroupCall argument = call;
  void* arguments[] = {&argument};
  const dim3 grid(static_cast<unsigned>(call.channels), static_cast<unsigned>(call.world));
  return static_cast<int>(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&all_reduce_kernel), grid,
                                                      dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream)));
}

}  // namespace pycoll::cuda_device
