// Adam and the sums of squares for any number of tensors in one launch each: a block a chunk. The last block that is
// done counts the steps, or adds what the others have found, in an order that does not depend on who was when.
#include <cuda_runtime.h>

#include "cuda/adam.h"
#include "cuda/chunks.cuh"
#include "cuda/combine.cuh"

namespace pycoll::cuda_device {

namespace {

// A function a pair of dtypes, not inlined: the kernel then takes the registers of the largest alone.
template <class P, class G>
__device__ __noinline__ void adam_chunk(const Threads& threads, const AdamPiece& piece, const AdamScalars& scalars) {
  adam_strided<P, G>(threads, piece, scalars);
}

__global__ void __launch_bounds__(kChunkThreads) adam_kernel(AdamLaunch launch) {
  __shared__ AdamScalars scalars;
  if (launch.chunk_count > 0 && !skips(launch)) {
    const Chunk chunk = launch.chunks[blockIdx.x];
    const AdamTarget& target = launch.targets[chunk.tensor];
    if (threadIdx.x == 0) scalars = scalars_of(launch, target);
    __syncthreads();
    const Threads threads{threadIdx.x, blockDim.x};
    const AdamPiece piece = piece_of(target, chunk.index);
    dispatch_float(target.dtype, [&](auto p) {
      dispatch_float(target.grad_dtype, [&](auto g) {
        adam_chunk<typename decltype(p)::type, typename decltype(g)::type>(threads, piece, scalars);
      });
    });
  }
  if (!comes_last(launch.finished, gridDim.x) || skips(launch)) return;
  for (uint32_t k = threadIdx.x; k < launch.target_count; k += blockDim.x) *launch.targets[k].step += 1;
}

// The sum of one value a thread, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double values[kChunkThreads];
  values[threadIdx.x] = value;
  for (unsigned half = kChunkThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  const double sum = values[0];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kChunkThreads) squares_kernel(SquaresLaunch launch) {
  const Chunk chunk = launch.chunks[blockIdx.x];
  const SquaresSource& source = launch.sources[chunk.tensor];
  const size_t begin = chunk.index * kChunk, left = source.count - begin;
  const Threads threads{threadIdx.x, blockDim.x};
  const double mine = dispatch_float(source.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return squares_strided<T>(threads, static_cast<const std::byte*>(source.data) + begin * sizeof(T),
                              left < kChunk ? left : kChunk);
  });
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) launch.partial[blockIdx.x] = sum;
  if (!comes_last(launch.finished, gridDim.x)) return;
  double rest = 0;
  for (uint32_t k = threadIdx.x; k < launch.chunk_count; k += blockDim.x) rest += load_relaxed(launch.partial[k]);
  const double total = block_sum(rest);
  if (threadIdx.x == 0) *launch.sum = total;
}

__global__ void clip_kernel(ClipLaunch launch) {
  double sum = 0;
  for (int k = 0; k < launch.count; ++k) sum += launch.sums[k];
  const Clipped c = clip_to_norm(sum, value_or(launch.scale, 1), launch.max_norm);
  launch.result[0] = c.norm;
  launch.result[1] = c.factor;
  launch.result[2] = c.found_inf;
}

__global__ void store_kernel(std::byte* to, TablePart part, size_t size) {
  for (size_t i = threadIdx.x; i < size; i += blockDim.x) to[i] = part.bytes[i];
}

}  // namespace

int launch_adam(const AdamLaunch& launch, void* stream) {
  const unsigned blocks = launch.chunk_count > 0 ? launch.chunk_count : 1;  // the steps count all the same
  adam_kernel<<<blocks, kChunkThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

int launch_squares(const SquaresLaunch& launch, void* stream) {
  squares_kernel<<<launch.chunk_count, kChunkThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

int launch_clip(const ClipLaunch& launch, void* stream) {
  clip_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

int launch_store(void* to, const TablePart& part, size_t size, void* stream) {
  store_kernel<<<1, kChunkThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<std::byte*>(to), part, size);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace pycoll::cuda_device
