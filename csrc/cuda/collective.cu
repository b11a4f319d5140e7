// The collectives: the algorithms of csrc/algorithms, a block for each channel of each rank on this GPU, in one launch.
#include <cuda_runtime.h>

#include <utility>

#include "cuda/block.h"
#include "cuda/executor.cuh"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

namespace {

__global__ void prepare_kernel(const DeviceRank* ranks, int channels) {
  const DeviceRank& rank = ranks[blockIdx.x];
  for (int c = 0; c < channels; ++c) new (&rank.links[c]) ChannelLinks(rank.table, c);
}

// One kernel a family: each holds all loops for all dtypes, which take long to compile.
template <Family kOfKernel>
__device__ void run(const DeviceCall& call, const DeviceCounts* counts) {
  __shared__ CallRecord records[kMaxRanks];
  const int index = static_cast<int>(blockIdx.y), channel = static_cast<int>(blockIdx.x);
  BlockExecutor exec(call.record.dtype, call.record.op, call.ranks[index], call.timeout_ns);
  run_block<kOfKernel>(exec, call, counts, index, channel, records);
}
template <Family kOfKernel>
__global__ void __launch_bounds__(kThreads, 1) collective_kernel(DeviceCall call) {
  run<kOfKernel>(call, nullptr);
}
__global__ void __launch_bounds__(kThreads, 1)
    exchange_kernel(DeviceCall call, const __grid_constant__ DeviceCounts counts) {
  run<Family::kExchange>(call, &counts);
}

const void* kernel_of(const CallRecord& r) {
  return dispatch_call(r.collective, r.algorithm, [](auto tag) {
    constexpr Family kOf = kFamily<typename decltype(tag)::type>;
    if constexpr (kOf == Family::kExchange) {
      return reinterpret_cast<const void*>(&exchange_kernel);
    } else {
      return reinterpret_cast<const void*>(&collective_kernel<kOf>);
    }
  });
}

}  // namespace

int prepare_ranks(const DeviceRank* ranks, int count, int channels, void* stream) {
  // Kernels are loaded when first asked for, which may wait for the device: not while a collective spins there.
  cudaFuncAttributes attributes{};
  for (const auto& [collective, algorithm] : {std::pair{Collective::kAllReduce, Algorithm::kOneShot},
                                              {Collective::kAllReduce, Algorithm::kRing},
                                              {Collective::kAllReduce, Algorithm::kOneShotLl},
                                              {Collective::kAllToAll, Algorithm::kDirect}}) {
    CallRecord record{};
    record.collective = collective;
    record.algorithm = algorithm;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel_of(record)); error != cudaSuccess) {
      return static_cast<int>(error);
    }
  }
  prepare_kernel<<<count, 1, 0, static_cast<cudaStream_t>(stream)>>>(ranks, channels);
  return static_cast<int>(cudaGetLastError());
}

int resident_blocks(int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  // Every kernel's launch bounds promise one block a multiprocessor.
  *blocks = multiprocessors;
  return static_cast<int>(error);
}

int launch_collective(const DeviceCall& call, const DeviceCounts* counts, void* stream) {
  void* arguments[] = {const_cast<DeviceCall*>(&call), const_cast<DeviceCounts*>(counts)};
  const dim3 grid(static_cast<unsigned>(call.channels), static_cast<unsigned>(call.ranks_here));
  return static_cast<int>(cudaLaunchCooperativeKernel(kernel_of(call.record), grid, dim3(kThreads), arguments, 0,
                                                      static_cast<cudaStream_t>(stream)));
}

}  // namespace pycoll::cuda_device
