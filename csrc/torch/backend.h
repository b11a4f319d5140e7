// The c10d backend: torch.distributed.init_process_group("pycoll").
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "torch/caller.h"

namespace pycoll::bindings {

// What torch asks of a group to make another like it; as a type of its own it can be copied from Python.
struct BackendOptions : c10d::Backend::Options {
  explicit BackendOptions(std::chrono::milliseconds timeout) : c10d::Backend::Options("pycoll", timeout) {}
};

class Backend : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;
  using TensorLists = std::vector<Tensors>;

  Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Names& names,
          const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds);

  // At the end of the interpreter: drains and closes the groups that are still there, while Python can still answer.
  static void close_all();

  const std::string getBackendName() const override { return "pycoll"; }

  c10::intrusive_ptr<Options> getBackendOptions() override;  // a copy
  // A group of some of this one's ranks, to which they alone must come; null on the others.
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<Options>& options) override;
  // A group of all who come to the store, as rank `rank` of `size`.
  c10::intrusive_ptr<c10d::Backend> merge(const c10::intrusive_ptr<c10d::Store>& store,
                                          const c10::intrusive_ptr<Options>& options, const int& rank,
                                          const int& size) override;

  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;  // sparse ones on the CPU as well
  Work allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  Work allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  Work allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override;
  Work gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  Work reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override;
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  Work reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::ReduceScatterOptions& options) override;
  Work scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override;
  Work alltoall_base(at::Tensor& output, at::Tensor& input, Splits& output_splits, Splits& input_splits,
                     const c10d::AllToAllOptions& options) override;
  Work alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  Work barrier(const c10d::BarrierOptions& options) override;

  Work send(Tensors& tensors, int peer, int tag) override;
  Work recv(Tensors& tensors, int peer, int tag) override;
  Work recvAnysource(Tensors& tensors, int tag) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return calls_; }
  void setTimeout(std::chrono::milliseconds timeout) override { caller_.comm().set_timeout(timeout); }
  void abort() override { caller_.comm().abort("pycoll: " + caller_.name() + " aborted the group"); }
  void shutdown() override { caller_.comm().close(); }

  std::string trace() const { return caller_.comm().trace(); }

  bool supportsTensorAlloc(c10::DeviceIndex device) override;
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;  // that peers map

 private:
  // `job()`, run as `options` say. Errors leave as torch's bindings know them.
  template <class CallOptions, class MakeJob>
  Work submit(c10d::OpType type, const char* title, const CallOptions& options, const MakeJob& make_job);
  Work mail(Mailing::Direction direction, const Tensors& tensors, int peer, int tag);
  Seat seat() const { return caller_.seat(); }
  const std::vector<uint64_t>& global_ranks() const { return caller_.comm().names().global_ranks; }

  Caller caller_;
  std::atomic<uint64_t> calls_{0}, monitored_barriers_{0};
  // torch splits once for each device that a backend serves, on one store: it gets the same group each time.
  c10::intrusive_ptr<c10d::Store> split_on_;
  c10::weak_intrusive_ptr<c10d::Backend> split_off_{c10::intrusive_ptr<c10d::Backend>()};
};

}  // namespace pycoll::bindings
