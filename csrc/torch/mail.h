// Send and receive on tensors: cpu/mail.h with what tensors need, and the handle that torch knows.
#pragma once

#include <memory>

#include "cpu/communicator.h"
#include "torch/tensors.h"
#include "torch/work.h"

namespace pycoll::bindings {

class Caller;

// What moves a message from or to memory of a GPU: copies on a stream of its own, which nothing else waits in.
class Courier : public cpu::Mover {
 public:
  virtual c10::Stream stream() const = 0;
};
// For a tensor there; its copies come after what the current stream holds by now. Throws UnsupportedError where pycoll
// was built without CUDA.
std::shared_ptr<Courier> make_courier(at::Device device);

// One message of this rank.
class Mailing : public Work {
 public:
  enum class Direction { kSend, kReceive };

  // Throws UsageError or UnsupportedError for a tensor that cannot travel.
  Mailing(int rank, const char* title, Direction direction, const at::Tensor& tensor);

  // `peer`: cpu::kAnySource for a receive from any. Throws Error.
  void start(cpu::Mail& mail, int peer, int tag);
  // The same for who waits at once: no thread of the communicator's is needed for it.
  void start_and_wait(cpu::Mail& mail, int peer, int tag);

  bool isCompleted() override;
  bool wait(std::chrono::milliseconds timeout) override;
  int sourceRank() const override { return request_.source(); }

 protected:
  std::optional<c10::Stream> stream() const override;

 private:
  cpu::Message message(int peer, int tag) const;
  void arrive() const;            // what was received goes where the tensor is
  void let_current_wait() const;  // for the GPU

  const Direction direction_;
  const Dense dense_;
  const std::shared_ptr<Courier> courier_;  // null on the CPU
  cpu::Request request_;
};

// c10d's: rank 0 awaits all others, and names who does not come in time; these await its answer. Throws Error (kTimeout),
// and leaves the communicator usable. `count`: of such barriers before, the same on all ranks.
void monitored_barrier(cpu::Communicator& comm, std::chrono::milliseconds timeout, bool wait_for_all, uint64_t count);

}  // namespace pycoll::bindings
