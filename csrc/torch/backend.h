// The c10d backend: torch.distributed.init_process_group("pycoll").
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "torch/device.h"
#include "torch/tensors.h"
#include "torch/work.h"

namespace pycoll::bindings {

struct Job;  // a call, and what it needs until it has ended

class Backend : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;

  Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Config& config,
          const cpu::Config& cuda_config, std::chrono::milliseconds timeout);
  ~Backend() override;

  // At the end of the interpreter: drains and closes the groups that are still there, while Python can still answer.
  static void close_all();

  const std::string getBackendName() const override { return "pycoll"; }

  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  Work allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  Work reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override;
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  Work barrier(const c10d::BarrierOptions& options) override;

  // What is not there yet says so by name.
  Work allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) override;
  Work allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) override;
  Work reduce(Tensors&, const c10d::ReduceOptions&) override;
  Work allgather_coalesced(TensorLists&, Tensors&, const c10d::AllgatherOptions&) override;
  Work allgather_into_tensor_coalesced(Tensors&, Tensors&, const c10d::AllgatherOptions&) override;
  Work gather(TensorLists&, Tensors&, const c10d::GatherOptions&) override;
  Work scatter(Tensors&, TensorLists&, const c10d::ScatterOptions&) override;
  Work reduce_scatter_tensor_coalesced(Tensors&, Tensors&, const c10d::ReduceScatterOptions&) override;
  Work alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                     const c10d::AllToAllOptions&) override;
  Work alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  Work send(Tensors&, int, int) override;
  Work recv(Tensors&, int, int) override;
  Work recvAnysource(Tensors&, int) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool) override;

  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return calls_; }
  void setTimeout(std::chrono::milliseconds timeout) override { comm_->set_timeout(timeout); }
  void abort() override { comm_->abort("pycoll: rank " + std::to_string(getRank()) + " aborted the group"); }
  void shutdown() override { comm_->close(); }

  bool supportsTensorAlloc(c10::DeviceIndex device) override;
  at::Tensor allocateTensor(long size, at::TensorOptions options) override;  // that peers map

 private:
  Work submit(c10d::OpType type, Job job, bool async);
  Work submit_on_device(c10d::OpType type, Job job, bool async);
  static std::function<void(std::exception_ptr)> completing(const c10::intrusive_ptr<bindings::Work>& work,
                                                            const std::function<void()>& finish);

  std::unique_ptr<DeviceSlot> device_;
  std::shared_ptr<cpu::Communicator> comm_;
  std::atomic<uint64_t> calls_{0};
};

}  // namespace pycoll::bindings
