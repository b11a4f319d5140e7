// What the CUDA side offers to FusedAdam: plain data in, an error code out. No torch, and no CUDA header either.
//
// Steps are counted in device memory, where the tables of cuda/chunks.h lie too, and nothing is read on the host, so that
// a launch can be captured in a graph.
#pragma once

#include "core/adam_strided.h"
#include "core/dtype.h"
#include "cuda/chunks.h"

namespace pycoll::cuda_device {

// A tensor: the piece is all of it.
struct AdamTarget {
  AdamPiece piece;
  float* step;  // steps made; the launch adds one
  DType dtype, grad_dtype;
};

// One-element inputs are pointers into device memory; null where they do not apply.
struct AdamLaunch {
  const AdamTarget* targets;
  const Chunk* chunks;
  uint32_t target_count, chunk_count;  // at least one target; a target without elements has no chunk
  uint32_t* finished;                  // 0 between launches: the blocks that are done
  AdamSettings settings;
  uint32_t seed;
  const float* lr;
  const float* grad_scale;
  const float* clip;
  const float* found_inf;
};

struct SquaresSource {
  const void* data;
  size_t count;
  DType dtype;
};

struct SquaresLaunch {
  const SquaresSource* sources;
  const Chunk* chunks;
  uint32_t chunk_count;
  uint32_t* finished;  // as above
  double* partial;     // [chunk_count] scratch
  double* sum;         // the result
};

struct ClipLaunch {
  const double* sums;
  int count;
  const float* scale;
  double max_norm;
  float* result;  // [3]: norm, factor, found_inf
};

// What a block of a kernel does that needs no GPU.

PYCOLL_HD bool skips(const AdamLaunch& a) { return value_or(a.found_inf, 0) != 0; }

PYCOLL_HD AdamScalars scalars_of(const AdamLaunch& a, const AdamTarget& target) {
  AdamSettings settings = a.settings;
  if (a.lr != nullptr) settings.lr = *a.lr;
  const double factor = static_cast<double>(value_or(a.clip, 1)) / value_or(a.grad_scale, 1);
  return adam_scalars(settings, static_cast<uint32_t>(*target.step) + 1, factor, a.seed);
}

PYCOLL_HD AdamPiece piece_of(const AdamTarget& target, uint32_t index) {
  AdamPiece p = target.piece;
  const size_t begin = index * kChunk, left = p.count - begin;
  p.param = static_cast<std::byte*>(p.param) + begin * size_of(target.dtype);
  p.grad = static_cast<const std::byte*>(p.grad) + begin * size_of(target.grad_dtype);
  p.master = p.master != nullptr ? p.master + begin : nullptr;
  p.exp_avg += begin;
  p.exp_avg_sq += begin;
  p.max_exp_avg_sq = p.max_exp_avg_sq != nullptr ? p.max_exp_avg_sq + begin : nullptr;
  p.count = left < kChunk ? left : kChunk;
  p.first += begin;
  return p;
}

// All of these return a cudaError_t.
int launch_adam(const AdamLaunch& launch, void* stream);
int launch_squares(const SquaresLaunch& launch, void* stream);
int launch_clip(const ClipLaunch& launch, void* stream);

}  // namespace pycoll::cuda_device
