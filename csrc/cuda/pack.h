// What the CUDA side offers to gradient buckets: plain data in, an error code out. No torch, and no CUDA header either.
#pragma once

#include "core/pack_strided.h"
#include "cuda/chunks.h"

namespace pycoll::cuda_device {

// A gradient, for elements `first` to `first + count` of the bucket.
struct PackSource {
  const void* grad;  // null: zeros
  size_t first, count;
  DType dtype;
};

struct PackLaunch {
  const PackSource* sources;
  const Chunk* chunks;
  uint32_t chunk_count;
  uint32_t* finished;  // 0 between launches: the blocks that are done
  uint32_t* lost;      // likewise: whether one has packed what is not finite
  Wire wire;
  void* to;
  float* residual;      // for 8 bits, or null
  const float* factor;  // one float in device memory; null: 1
  float* found_inf;     // one float: 1 if anything packed is not finite, else 0; or null
};

struct AverageLaunch {
  const Int8Unit* wires;  // [world][units]
  int world;
  size_t units;
  float* to;
};

// What a block of a kernel does that needs no GPU.

PYCOLL_HD PackPiece piece_of(const PackLaunch& a, const Chunk& chunk) {
  const PackSource& source = a.sources[chunk.tensor];
  const size_t begin = chunk.index * kChunk, left = source.count - begin;
  const void* const grad =
      source.grad == nullptr ? nullptr : static_cast<const std::byte*>(source.grad) + begin * size_of(source.dtype);
  return {grad, a.to, a.residual, source.first + begin, left < kChunk ? left : kChunk};
}

// Both return a cudaError_t.
int launch_pack(const PackLaunch& launch, void* stream);
int launch_average(const AverageLaunch& launch, void* stream);

}  // namespace pycoll::cuda_device
