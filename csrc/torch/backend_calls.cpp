// What torch.distributed calls of a group: collectives and messages, each as a job of this rank (torch/job.h).
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "torch/backend.h"
#include "torch/errors.h"
#include "torch/sparse.h"

namespace pycoll::bindings {

using c10d::OpType;

namespace {

Reduction reduction_of(const c10d::ReduceOp& op) {
  switch (static_cast<c10d::ReduceOp::RedOpType>(op)) {
    case c10d::ReduceOp::SUM:
      return {ReduceOp::kSum};
    case c10d::ReduceOp::AVG:
      return {ReduceOp::kAvg};
    case c10d::ReduceOp::MIN:
      return {ReduceOp::kMin};
    case c10d::ReduceOp::MAX:
      return {ReduceOp::kMax};
    case c10d::ReduceOp::PRODUCT:
      return {ReduceOp::kProduct};
    case c10d::ReduceOp::BAND:
      return {ReduceOp::kBand};
    case c10d::ReduceOp::BOR:
      return {ReduceOp::kBor};
    case c10d::ReduceOp::BXOR:
      return {ReduceOp::kBxor};
    case c10d::ReduceOp::PREMUL_SUM: {
      const auto* by = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
      if (by == nullptr)
        throw_usage("PREMUL_SUM without a factor: make it with torch.distributed._make_nccl_premul_sum");
      return {ReduceOp::kSum, by->tensor_factor.defined() ? by->tensor_factor : at::scalar_tensor(by->double_factor)};
    }
    default:
      throw_unsupported("torch.distributed's reduce op number " +
                        std::to_string(static_cast<int>(static_cast<c10d::ReduceOp::RedOpType>(op))) + " is not there");
  }
}

template <class T>
const T& only(const std::vector<T>& list, const char* collective) {
  if (list.size() != 1) {
    throw_unsupported(std::string(collective) + " takes one tensor a call, not " + std::to_string(list.size()));
  }
  return list[0];
}

void check_lengths(const Tensors& a, const Tensors& b, const char* collective) {
  if (a.size() == b.size() && !a.empty()) return;
  throw_usage(c10::str(collective, " needs as many outputs as inputs, not ", a.size(), " and ", b.size()));
}

// `job(i)` for each of `count`, one after another.
template <class MakeJob>
Job in_turn(size_t count, const MakeJob& job) {
  Job all;
  for (size_t i = 0; i < count; ++i) all.append(job(i));
  return all;
}

}  // namespace

template <class CallOptions, class MakeJob>
Backend::Work Backend::submit(OpType type, const char* title, const CallOptions& options, const MakeJob& make_job) {
  ++calls_;
  try {
    Job job = make_job();
    for (cpu::Call& call : job.calls) call.timeout = options.timeout;
    return caller_.start(type, title, std::move(job), options.asyncOp);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  if (x.layout() == at::kSparse) return allreduce_sparse(tensors, options);
  return submit(OpType::ALLREDUCE, "pycoll:all_reduce", options,
                [&] { return all_reduce_job(x, x, reduction_of(options.reduceOp), std::nullopt); });
}

Backend::Work Backend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  check_sparse(x, options.reduceOp == c10d::ReduceOp::SUM);
  ++calls_;
  try {
    return caller_.start(OpType::_ALLREDUCE_SPARSE, "pycoll:sparse_all_reduce", tensors, sparse_all_reduce(seat(), x),
                         options.asyncOp);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return submit(OpType::ALLREDUCE_COALESCED, "pycoll:all_reduce", options, [&] {
    return in_turn(tensors.size(), [&](size_t i) {
      return all_reduce_job(tensors[i], tensors[i], reduction_of(options.reduceOp), std::nullopt);
    });
  });
}

Backend::Work Backend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor& x = only(tensors, "reduce");
  return submit(OpType::REDUCE, "pycoll:reduce", options, [&] {
    return reduce_job(seat(), x, x, reduction_of(options.reduceOp), static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& x = only(tensors, "broadcast");
  return submit(OpType::BROADCAST, "pycoll:broadcast", options,
                [&] { return broadcast_job(seat(), x, static_cast<int>(options.rootRank)); });
}

Backend::Work Backend::allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  const at::Tensor& x = only(inputs, "all_gather");
  const Tensors& blocks = only(outputs, "all_gather");
  return submit(OpType::ALLGATHER, "pycoll:all_gather", options, [&] { return all_gather_job(seat(), x, blocks); });
}

Backend::Work Backend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  return submit(OpType::_ALLGATHER_BASE, "pycoll:all_gather", options,
                [&] { return all_gather_job(seat(), input, Blocks(output)); });
}

Backend::Work Backend::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                           const c10d::AllgatherOptions& options) {
  return submit(OpType::COALESCED, "pycoll:all_gather", options, [&] {
    return in_turn(inputs.size(), [&](size_t i) {
      Tensors of_ranks;
      for (const Tensors& of_rank : outputs) {
        check_lengths(of_rank, inputs, "all_gather_coalesced");
        of_ranks.push_back(of_rank[i]);
      }
      return all_gather_job(seat(), inputs[i], of_ranks);
    });
  });
}

Backend::Work Backend::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return submit(OpType::COALESCED, "pycoll:all_gather", options, [&] {
    check_lengths(outputs, inputs, "all_gather_into_tensor_coalesced");
    return in_turn(inputs.size(), [&](size_t i) { return all_gather_job(seat(), inputs[i], Blocks(outputs[i])); });
  });
}

Backend::Work Backend::gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  const at::Tensor& x = only(inputs, "gather");
  return submit(OpType::GATHER, "pycoll:gather", options, [&] {
    std::optional<Blocks> blocks;
    if (!outputs.empty()) blocks.emplace(seat(), only(outputs, "gather"), x, "gather");
    return gather_job(seat(), x, blocks, static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& options) {
  const at::Tensor& output = only(outputs, "reduce_scatter");
  const Tensors& blocks = only(inputs, "reduce_scatter");
  return submit(OpType::REDUCE_SCATTER, "pycoll:reduce_scatter", options,
                [&] { return reduce_scatter_job(seat(), blocks, output, reduction_of(options.reduceOp)); });
}

Backend::Work Backend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                            const c10d::ReduceScatterOptions& options) {
  return submit(OpType::_REDUCE_SCATTER_BASE, "pycoll:reduce_scatter", options,
                [&] { return reduce_scatter_job(seat(), Blocks(input), output, reduction_of(options.reduceOp)); });
}

Backend::Work Backend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                       const c10d::ReduceScatterOptions& options) {
  return submit(OpType::COALESCED, "pycoll:reduce_scatter", options, [&] {
    check_lengths(outputs, inputs, "reduce_scatter_tensor_coalesced");
    return in_turn(inputs.size(), [&](size_t i) {
      return reduce_scatter_job(seat(), Blocks(inputs[i]), outputs[i], reduction_of(options.reduceOp));
    });
  });
}

Backend::Work Backend::scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) {
  const at::Tensor& output = only(outputs, "scatter");
  return submit(OpType::SCATTER, "pycoll:scatter", options, [&] {
    std::optional<Blocks> blocks;
    if (!inputs.empty()) blocks.emplace(seat(), only(inputs, "scatter"), output, "scatter");
    return scatter_job(seat(), blocks, output, static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::alltoall_base(at::Tensor& output, at::Tensor& input, Splits& output_splits, Splits& input_splits,
                                     const c10d::AllToAllOptions& options) {
  return submit(OpType::ALLTOALL_BASE, "pycoll:all_to_all", options,
                [&] { return all_to_all_job(seat(), input, output, input_splits, output_splits); });
}

Backend::Work Backend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  return submit(OpType::ALLTOALL, "pycoll:all_to_all", options,
                [&] { return all_to_all_job(seat(), inputs, outputs); });
}

Backend::Work Backend::barrier(const c10d::BarrierOptions& options) {
  return submit(OpType::BARRIER, "pycoll:barrier", options, [] { return barrier_job(); });
}

Backend::Work Backend::mail(Mailing::Direction direction, const Tensors& tensors, int peer, int tag) {
  try {
    const bool sends = direction == Mailing::Direction::kSend;
    return caller_.mail(direction, only(tensors, sends ? "send" : "recv"), peer, tag, /*async=*/true);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::send(Tensors& tensors, int peer, int tag) {
  return mail(Mailing::Direction::kSend, tensors, peer, tag);
}

Backend::Work Backend::recv(Tensors& tensors, int peer, int tag) {
  return mail(Mailing::Direction::kReceive, tensors, peer, tag);
}

Backend::Work Backend::recvAnysource(Tensors& tensors, int tag) {
  return mail(Mailing::Direction::kReceive, tensors, cpu::kAnySource, tag);
}

void Backend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  try {
    const bool given = options.timeout != c10d::kUnsetTimeout;
    monitored_barrier(caller_.comm(), given ? options.timeout : caller_.comm().timeout(), wait_all_ranks,
                      monitored_barriers_++);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

}  // namespace pycoll::bindings
