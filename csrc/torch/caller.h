// What the two front ends have in common: a communicator, the device of its rank, and how jobs get there.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "torch/device.h"
#include "torch/job.h"
#include "torch/mail.h"
#include "torch/work.h"

namespace pycoll::bindings {

class Caller {
 public:
  // Meets the other ranks, under a key of its own on the store.
  Caller(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, const cpu::Names& names, int rank,
         int world, const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds);
  ~Caller();  // closes; without Python's lock, which callbacks of futures may need

  Seat seat() const { return {comm_->rank(), comm_->world()}; }
  std::string name() const { return comm_->names().rank(comm_->rank()); }  // of this rank, in texts
  cpu::Communicator& comm() const { return *comm_; }
  const std::shared_ptr<cpu::Communicator>& shared_comm() const { return comm_; }
  DeviceSlot& device() const { return *device_; }

  // Blocks until done (on a GPU: until the current stream will go on after it). Throws Error. `title`: for profilers, such
  // as "pycoll:all_reduce".
  void run(const char* title, Job& job);
  // The same with a handle, which `async` is returned at once. Throws Error.
  c10::intrusive_ptr<Work> start(c10d::OpType type, const char* title, Job job, bool async);
  // What no single job can say, on the CPU: `turn` runs when its turn has come.
  c10::intrusive_ptr<Work> start(c10d::OpType type, const char* title, Tensors tensors, cpu::Communicator::Turn turn,
                                 bool async);

  // A message, which neither waits for collectives nor delays them. `peer`: cpu::kAnySource for a receive from any.
  c10::intrusive_ptr<Mailing> mail(Mailing::Direction direction, const at::Tensor& tensor, int peer, int tag,
                                   bool async);

 private:
  std::shared_ptr<DeviceTurn> prepare(Job& job, bool async);  // null on the CPU
  void block_on(const Job& job, DeviceTurn* turn);
  c10::intrusive_ptr<Work> work_for(c10d::OpType type, const char* title, const Tensors& inputs, Tensors result,
                                    std::shared_ptr<DeviceTurn> turn = nullptr);

  std::unique_ptr<DeviceSlot> device_;
  std::shared_ptr<cpu::Communicator> comm_;
};

}  // namespace pycoll::bindings
