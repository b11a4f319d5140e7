// Collectives on tensors as calls on raw memory: checked, with all that the memory needs until the calls have ended.
// Both front ends, pycoll.Communicator and the c10d backend, make their calls of these.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <optional>
#include <vector>

#include "cpu/communicator.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

using Tensors = std::vector<at::Tensor>;
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

// Who makes the calls.
struct Seat {
  int rank, world;
};

// A tensor of blocks, one for each rank, in dense memory: one tensor, or a list, whose tensors are copied from or to
// their places, unless they lie there already.
struct Blocks {
  explicit Blocks(const at::Tensor& whole);
  explicit Blocks(const Tensors& list);
  // A list of `world` tensors of the size of `like`. Throws UsageError, UnsupportedError.
  Blocks(Seat seat, const Tensors& list, const at::Tensor& like, const char* collective);
  at::Tensor memory;
  c10::SmallVector<Dense, 2> parts;
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

}  // namespace pycoll::bindings
