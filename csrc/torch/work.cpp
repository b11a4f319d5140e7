#include "torch/work.h"

#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include "cpu/communicator.h"
#include "cpu/os.h"
#include "cpu/wait.h"
#include "torch/errors.h"

namespace pycoll::bindings {

void Work::complete(std::exception_ptr failure) {
  finish(failure ? for_python(failure) : nullptr);
  mark_future();
}

bool Work::wait(std::chrono::milliseconds timeout) {
  const auto deadline = cpu::Clock::now() + timeout;
  std::unique_lock guard(mutex_);
  if (!completed_ && cpu::Communicator::inside(turns_)) {
    throw PyError(Error(ErrorKind::kUsage,
                        "pycoll: wait() was called from within another collective of the group, by a signal handler or "
                        "a callback, which ends before this one can run: chain the futures instead"));
  }
  while (!cv_.wait_for(guard, std::chrono::milliseconds(20), [this] { return completed_; })) {
    if (timeout != kNoTimeout && cpu::Clock::now() > deadline) {
      throw PyError(cpu::Error(cpu::ErrorKind::kTimeout, "pycoll: the work did not end within the " +
                                                             std::to_string(timeout.count()) + " ms given to wait()"));
    }
    guard.unlock();
    cpu::check_interrupt();
    guard.lock();
  }
  if (exception_) std::rethrow_exception(exception_);
  guard.unlock();
  if (on_device_) {
    try {
      on_device_->let_current_wait();
    } catch (const Error& e) {
      throw PyError(e);
    }
  }
  return true;
}

std::optional<c10::Stream> Work::stream() const {
  return on_device_ ? std::make_optional(on_device_->stream()) : std::nullopt;
}

bool Work::isCompleted() {
  {
    const std::lock_guard guard(mutex_);
    if (!completed_ || exception_) return completed_;
  }
  return !on_device_ || on_device_->ended();
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  {
    const std::lock_guard guard(mutex_);
    if (future_) return future_;
    std::vector<at::Device> devices;
    if (const auto where = stream()) devices.push_back(where->device());
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
  }
  mark_future();
  return future_;
}

void Work::mark_future() {
  {
    const std::lock_guard guard(mutex_);
    if (!future_ || !completed_ || marked_) return;
    marked_ = true;
  }
  cpu::Communicator::hand_on();        // to the next call, for which callbacks of the future may wait
  std::optional<c10::StreamGuard> on;  // the future is ready when the call's stream gets here
  if (const auto where = stream()) on.emplace(*where);
  if (exception_) {
    future_->setError(exception_);
  } else {
    future_->markCompleted(c10::IValue(result_));
  }
}

void Work::abort() {
  throw_unsupported(
      "a single collective cannot be aborted: abort its group, torch.distributed.destroy_process_group()");
}

}  // namespace pycoll::bindings
