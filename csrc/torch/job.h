// Collectives on tensors as calls on raw memory: checked, with all that the memory needs until the calls have ended.
// Both front ends, pycoll.Communicator and the c10d backend, make their calls of these.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <vector>

#include "cpu/communicator.h"
#include "torch/blocks.h"

namespace pycoll::bindings {

using Splits = std::vector<int64_t>;

struct Job {
  c10::SmallVector<cpu::Call, 1> calls;  // one after another
  c10::SmallVector<Dense, 2> reads, writes;
  Tensors result;
  std::vector<std::vector<uint64_t>> counts;  // that calls point to

  void load() const {
    for (const Dense& d : reads) d.load();
  }
  void store() const {
    for (const Dense& d : writes) d.store();
  }
  void append(Job&& other);
};

// All throw UsageError or UnsupportedError for what does not fit. `reads` and `writes` are in order. Outputs, and where
// something is scattered inputs, are there on the root alone where there is one.
Job all_reduce_job(const at::Tensor& x, const at::Tensor& out, const Reduction& by, std::optional<Algorithm> algorithm);
Job reduce_job(Seat seat, const at::Tensor& x, const at::Tensor& out, const Reduction& by, int root);
Job broadcast_job(Seat seat, const at::Tensor& x, int root);
Job all_gather_job(Seat seat, const at::Tensor& x, const Blocks& out);
Job all_gather_job(Seat seat, const at::Tensor& x, const Tensors& out);  // of any sizes
Job gather_job(Seat seat, const at::Tensor& x, const std::optional<Blocks>& out, int root);
Job reduce_scatter_job(Seat seat, const Blocks& x, const at::Tensor& out, const Reduction& by);
Job reduce_scatter_job(Seat seat, const Tensors& x, const at::Tensor& out, const Reduction& by);  // of any sizes
Job scatter_job(Seat seat, const std::optional<Blocks>& x, const at::Tensor& out, int root);
// Splits: rows along dimension 0 for each rank; none: equal ones.
Job all_to_all_job(Seat seat, const at::Tensor& x, const at::Tensor& out, const Splits& send, const Splits& recv);
Job all_to_all_job(Seat seat, const Tensors& x, const Tensors& out);
Job barrier_job();

// The call of a collective that moves elements, as yet without memory; `counted`: what its count is of.
cpu::Call movement(Collective collective, const at::Tensor& counted, int root = 0);

}  // namespace pycoll::bindings
