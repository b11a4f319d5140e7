// One verb of the host-stepped executor: the whole GPU moves or reduces, and waits for nobody.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/combine.cuh"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

namespace {

__global__ void __launch_bounds__(kThreads) step_kernel(StepCall call) {
  const Threads threads{static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x,
                        static_cast<size_t>(gridDim.x) * blockDim.x};
  combine(threads, call.dtype, call.op,
          {call.dst, call.dst_count, call.src, call.src_count, call.wire_sources, call.final, call.world, call.count});
}

}  // namespace

int launch_step(const StepCall& call, void* stream) {
  constexpr size_t kElementsPerBlock = kThreads * 16, kMostBlocks = 1024;
  const size_t blocks = std::clamp<size_t>(ceil_div(call.count, kElementsPerBlock), 1, kMostBlocks);
  step_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace pycoll::cuda_device
