// The handle of a collective that was called through torch.distributed.
#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "torch/device.h"

namespace pycoll::bindings {

class Work : public c10d::Work {
 public:
  // `title` and `inputs`: what torch's profilers show of it, until complete().
  // `turns`: the communicator's, see cpu::Communicator::inside.
  // `on_device`: where it runs on a GPU, null on the CPU. wait() then orders the current stream after it, and the host
  // only as far as the ranks meet there.
  Work(int rank, c10d::OpType type, const char* title, const std::optional<std::vector<at::Tensor>>& inputs,
       std::vector<at::Tensor> result, const void* turns, std::shared_ptr<DeviceTurn> on_device = nullptr)
      : c10d::Work(rank, type, title, inputs),
        result_(std::move(result)),
        turns_(turns),
        on_device_(std::move(on_device)) {}

  // Ends the work, once: with a failure, or without.
  void complete(std::exception_ptr failure);

  bool isCompleted() override;  // on a GPU: and whether the GPU has done it
  void synchronize() override { wait(kNoTimeout); }
  bool wait(std::chrono::milliseconds timeout) override;  // lets Python's signals in; throws the failure
  std::vector<at::Tensor> result() override { return result_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;  // made when asked for: most are not
  void abort() override;

 protected:
  // Where the result is ready, on a GPU.
  virtual std::optional<c10::Stream> stream() const;

 private:
  void mark_future();  // if there is one, and the work has ended; once

  std::vector<at::Tensor> result_;
  const void* const turns_;
  const std::shared_ptr<DeviceTurn> on_device_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  bool marked_ = false;
};

}  // namespace pycoll::bindings
