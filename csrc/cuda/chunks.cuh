// What kernels have in common whose blocks are chunks (cuda/chunks.h).
#pragma once

#include "core/atomic.h"
#include "cuda/chunks.h"

namespace pycoll::cuda_device {

constexpr int kChunkThreads = 256;  // of a block

// True in all threads of the block that comes last, to which all that the others have written is visible.
static __device__ bool comes_last(uint32_t* finished, uint32_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = fetch_add_seq_cst(*finished, 1u) + 1 == blocks;
  __syncthreads();
  if (last && threadIdx.x == 0) store_relaxed(*finished, 0u);
  return last;
}

}  // namespace pycoll::cuda_device
