// The collectives: the algorithms of csrc/algorithms, a block for each channel of each rank on this GPU, in one launch.
#include <cuda_runtime.h>

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
__global__ void __launch_bounds__(kThreads, 1) collective_kernel(DeviceCall call) {
  __shared__ CallRecord records[kMaxRanks];
  const int index = static_cast<int>(blockIdx.y), channel = static_cast<int>(blockIdx.x);
  BlockExecutor exec(call.record.dtype, call.record.op, call.ranks[index], call.timeout_ns);
  run_block<kOfKernel>(exec, call, index, channel, records);
}

const void* kernel_of(const CallRecord& r) {
  return dispatch_call(r.collective, r.algorithm, [](auto tag) {
    return reinterpret_cast<const void*>(&collective_kernel<kFamily<typename decltype(tag)::type>>);
  });
}

}  // namespace

int prepare_ranks(const DeviceRank* ranks, int count, int channels, void* stream) {
  // Kernels are loaded when first asked for, which may wait for the device: not while a collective spins there.
  cudaFuncAttributes attributes{};
  for (const Algorithm a : {Algorithm::kOneShot, Algorithm::kRing, Algorithm::kOneShotLl}) {
    CallRecord record{};
    record.collective = Collective::kAllReduce;
    record.algorithm = a;
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

int launch_collective(const DeviceCall& call, void* stream) {
  DeviceCall argument = call;
  void* arguments[] = {&argument};
  const dim3 grid(static_cast<unsigned>(call.channels), static_cast<unsigned>(call.ranks_here));
  return static_cast<int>(cudaLaunchCooperativeKernel(kernel_of(call.record), grid, dim3(kThreads), arguments, 0,
                                                      static_cast<cudaStream_t>(stream)));
}

}  // namespace pycoll::cuda_device
