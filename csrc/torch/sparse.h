// The all-reduce of sparse (COO) tensors on the CPU.
#pragma once

#include "torch/job.h"

namespace pycoll::bindings {

// Throws UnsupportedError for what is not a sum of sparse CPU tensors.
void check_sparse(const at::Tensor& x, bool is_sum);

// Leaves the sum of all ranks' tensors, coalesced, in `x`. Ranks may hold different elements, and any number of them;
// the sizes are the same. Each rank gets the elements of all and adds them, in rank order.
cpu::Communicator::Turn sparse_all_reduce(Seat seat, const at::Tensor& x);

}  // namespace pycoll::bindings
