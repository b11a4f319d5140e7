// Gradients of any number into a wire in one launch, a block a chunk; and the average of 8-bit wires.
#include <cuda_runtime.h>

#include "cuda/chunks.cuh"
#include "cuda/combine.cuh"
#include "cuda/pack.h"

namespace pycoll::cuda_device {

namespace {

// One of a block's, which take turns at its scale blocks.
struct Warp {
  static constexpr unsigned kThreads = 32;
  __device__ size_t thread() const { return threadIdx.x % kThreads; }
  __device__ size_t index() const { return threadIdx.x / kThreads; }
  __device__ size_t groups() const { return blockDim.x / kThreads; }
  __device__ int32_t largest(int32_t x) const { return __reduce_max_sync(0xffffffff, x); }
};

// Functions a pair of dtypes, not inlined: the kernel then takes the registers of the largest alone.
template <class G, class W>
__device__ __noinline__ bool pack_chunk(const PackPiece& piece, const float* factor) {
  return pack_strided<G, W>(Threads{threadIdx.x, blockDim.x}, piece, factor);
}
template <class G>
__device__ __noinline__ bool pack_int8_chunk(const PackPiece& piece, const float* factor) {
  return pack_int8_strided<G>(Warp{}, piece, factor);
}

__device__ bool pack(const PackLaunch& launch, const Chunk& chunk) {
  const PackPiece piece = piece_of(launch, chunk);
  if (piece.grad == nullptr) {
    pack_zeros(Threads{threadIdx.x, blockDim.x}, launch.wire, piece);
    return true;
  }
  return dispatch_float(launch.sources[chunk.tensor].dtype, [&](auto g) {
    using G = typename decltype(g)::type;
    if (launch.wire == Wire::kInt8) return pack_int8_chunk<G>(piece, launch.factor);
    return dispatch_float(dtype_of(launch.wire),
                          [&](auto w) { return pack_chunk<G, typename decltype(w)::type>(piece, launch.factor); });
  });
}

__global__ void __launch_bounds__(kChunkThreads) pack_kernel(PackLaunch launch) {
  const bool finite = launch.chunk_count == 0 || pack(launch, launch.chunks[blockIdx.x]);
  if (launch.found_inf == nullptr) return;
  if (__syncthreads_or(!finite) && threadIdx.x == 0) store_relaxed(*launch.lost, 1u);
  if (!comes_last(launch.finished, gridDim.x) || threadIdx.x != 0) return;
  *launch.found_inf = load_relaxed(*launch.lost) != 0 ? 1.0f : 0.0f;
  store_relaxed(*launch.lost, 0u);
}

__global__ void __launch_bounds__(kChunkThreads) average_kernel(AverageLaunch launch) {
  const Threads grid{blockIdx.x * size_t{blockDim.x} + threadIdx.x, size_t{gridDim.x} * blockDim.x};
  average_int8_strided(grid, launch.wires, launch.world, launch.units, launch.to);
}

}  // namespace

int launch_pack(const PackLaunch& launch, void* stream) {
  const unsigned blocks = launch.chunk_count > 0 ? launch.chunk_count : 1;  // found_inf is cleared all the same
  pack_kernel<<<blocks, kChunkThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

// A unit is what the threads of a block take at once.
int launch_average(const AverageLaunch& launch, void* stream) {
  static_assert(kUnit == kChunkThreads * strided::kVector<float>);
  constexpr size_t kMost = 1 << 16;
  const auto blocks = static_cast<unsigned>(launch.units < kMost ? launch.units : kMost);
  if (blocks == 0) return 0;
  average_kernel<<<blocks, kChunkThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace pycoll::cuda_device
