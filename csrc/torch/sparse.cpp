#include "torch/sparse.h"

#include <ATen/core/grad_mode.h>

#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

// The tensors of all ranks, of which each has `counts[r]` rows and is of the size of `mine` else.
Tensors gather_rows(Seat seat, const at::Tensor& mine, const std::vector<int64_t>& counts,
                    const cpu::Communicator::Runner& run) {
  Tensors all;
  for (int r = 0; r < seat.world; ++r) {
    std::vector<int64_t> sizes = mine.sizes().vec();
    sizes[0] = counts[r];
    all.push_back(r == seat.rank ? mine : at::empty(sizes, mine.options()));
    for (const cpu::Call& call : broadcast_job(seat, all.back(), r).calls) run(call);
  }
  return all;
}

}  // namespace

void check_sparse(const at::Tensor& x, bool is_sum) {
  if (!is_sum) throw_unsupported("all_reduce of sparse tensors sums, and has no other operation: use .to_dense()");
  if (x.layout() != at::kSparse || !x.device().is_cpu()) {
    throw_unsupported("all_reduce of sparse tensors takes COO tensors on the CPU: use .to_dense()");
  }
}

cpu::Communicator::Turn sparse_all_reduce(Seat seat, const at::Tensor& x) {
  return [seat, x](const cpu::Communicator::Runner& run) {
    const at::NoGradGuard no_grad;
    const at::Tensor mine = x.coalesce();
    const at::Tensor rows = mine.indices().t().contiguous(), values = mine.values().contiguous();
    int64_t count = rows.size(0);
    std::vector<int64_t> counts(seat.world);
    const std::array<int64_t, 2> dims{mine.sparse_dim(), mine.dense_dim()};
    run({.collective = Collective::kAllGather,
         .dtype = DType::kInt64,
         .in = &count,
         .out = counts.data(),
         .count = 1,
         .shape = fingerprint(x.scalar_type(), x.sizes()) ^ fingerprint(at::kLong, dims)});
    const at::Tensor all_rows = at::cat(gather_rows(seat, rows, counts, run));
    const at::Tensor all_values = at::cat(gather_rows(seat, values, counts, run));
    x.copy_(at::_sparse_coo_tensor_unsafe(all_rows.t(), all_values, x.sizes(), values.options().layout(at::kSparse))
                .coalesce());
  };
}

}  // namespace pycoll::bindings
