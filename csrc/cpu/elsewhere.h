// Calls on memory that the CPU does not move: tensors of GPUs whose ranks meet on the host (csrc/torch/cuda).
//
// The CPU keeps the protocol: barriers, records, liveness, time-outs. What moves the data is one of these.
#pragma once

#include <vector>

#include "core/combine.h"
#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycoll::cpu {

struct Call;  // cpu/call.h

// The host-stepped executor: each verb is work for the rank's own GPU, which nothing there waits for. Slots and links
// are those of the CPU, in memory that all GPUs reach.
class Mover {
 public:
  virtual ~Mover() = default;
  virtual void combine(DType dtype, ReduceOp op, const CombineArgs& args) = 0;
  virtual void copy(void* dst, const void* src, size_t bytes) = 0;
  virtual bool done() = 0;  // whether all that was asked for so far has happened, for every rank to see
};

// Ranks that are threads of one process and share a GPU: when all have come, one of them runs the call for all.
class Meeting {
 public:
  virtual ~Meeting() = default;
  // On rank 0. `calls` [world]: of the ranks, all the same but for their memory.
  virtual void run(const std::vector<const Call*>& calls) = 0;
};

}  // namespace pycoll::cpu
