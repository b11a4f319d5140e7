// Gradient buckets on the CPU: packing gradients into a wire, and what a rank does with its shard of all ranks' wires
// (csrc/README.md, B1 to B5). Without torch and without threads: who calls divides the work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/adam_math.h"
#include "core/wire.h"

namespace pycoll::cpu {

// `count` elements of a gradient, in memory order, into the elements from `first` on of a wire; `first` is a multiple of
// kScaleBlock. `grad`: float32 or 16 bits; null: zeros. `residual`: of the bucket's elements, for 8 bits, else null.
// `streams`: the wire's elements go past the caches, but in 8 bits.
void pack(Wire wire, const void* grad, DType dtype, size_t first, size_t count, void* to, float* residual,
          bool streams = false);

// What a rank has of a bucket.
struct Shard {
  Wire wire;
  int rank, world;
  size_t units;          // of the whole bucket: a multiple of `world`
  bool streams = false;  // what is written without having been read goes past the caches: there is too much of it

  size_t size() const { return units / static_cast<size_t>(world); }
  size_t first() const { return size() * static_cast<size_t>(rank); }
};

// Units `from` to `to` of the shard, counted in it, averaged into the gradients of all ranks, or of none where out[rank] is
// null. `squares` [shard.size()]: the sums of their squares.
void reduce_units(const Shard& shard, const void* const* in, void* const* out, double* squares, size_t from, size_t to);

// A parameter that a step updates: elements `begin` to `end` of the bucket.
struct Segment {
  size_t begin, end;
  uint64_t first;  // index of element `begin` among those of all parameters, for the random numbers
  AdamScalars scalars;
  bool master, amsgrad, stochastic;  // what of the state it uses, and how it rounds
};

// The state of a shard's elements: of the bucket's element e at e - shard.first() * kUnit. Null where no segment uses it.
struct AdamState {
  DType dtype;  // of the parameters
  float* master;
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;
};

// Updates those elements of the shard's units `from` to `to` that are in `segments` (ascending), and writes the new
// parameters to all ranks' `out`. What a segment's element is does not depend on how the work is cut.
void update_units(const Shard& shard, const void* const* in, void* const* out, const AdamState& state,
                  std::span<const Segment> segments, size_t from, size_t to);

}  // namespace pycoll::cpu
