// What a communicator does with tensors of a GPU. The interface is here for every build; csrc/torch/cuda implements it.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>

#include "cpu/communicator.h"

namespace pycoll::bindings {

// What has gone wrong on a GPU, for whoever asks later; outlives the device.
class DeviceFailure {
 public:
  void set(std::exception_ptr what);  // the first counts
  void throw_if_any() const;

 private:
  mutable std::mutex lock_;
  std::exception_ptr what_;
};

// How the ranks of a communicator meet on their GPUs. Made by all ranks together, on the first such tensor.
class Device {
 public:
  virtual ~Device() = default;

  // Prepares a call of memory on this rank's GPU. Either it is the host's from then on (`mover` or `meeting` is set, and
  // the communicator runs it), or launch() runs it.
  virtual bool on_host() const = 0;
  virtual void prepare(cpu::Call& call) = 0;
  // Orders the call on the current stream, and returns at once.
  virtual void launch(const cpu::Call& call) = 0;
  // This rank cannot launch what the others do: running and later calls fail on all. What the host runs it tells itself.
  virtual void fail(const std::string&) {}

  // For calls that others are not to wait for, and for what the host runs.
  virtual c10::Stream stream() const = 0;

  const std::shared_ptr<DeviceFailure>& failure() const { return failure_; }
  // Memory that peers map where they can; else any.
  virtual at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) = 0;
  virtual size_t footprint() const = 0;  // bytes on the GPU
  virtual std::string describe() const = 0;

 protected:
  std::shared_ptr<DeviceFailure> failure_ = std::make_shared<DeviceFailure>();
};

// The device of a communicator, if it has met on one yet. Ends when the communicator closes.
class DeviceSlot {
 public:
  // `config`: wishes for the GPU.
  DeviceSlot(cpu::Communicator& host, const cpu::Config& config);

  // The ranks meet on this GPU, unless they have. A collective the first time. Throws UsageError for another GPU than
  // then, UnsupportedError where pycoll was built without CUDA.
  void meet(at::Device device);
  // f(device), which stays until f returns. Throws Error where there is none, or none any more.
  template <class F>
  auto with(const F& f) const {
    return state_->with(f);
  }
  // f(device), if there is one.
  template <class F>
  void if_any(const F& f) const {
    state_->if_any(f);
  }
  // Bytes in memory that peers map, also when the slot is gone: then it throws. None where peers map no memory.
  std::function<at::Tensor(int64_t)> allocator(at::Device device);

 private:
  friend class DeviceTurn;
  bool has_device() const;

  struct State {
    std::mutex meeting;             // of ranks, which may take long
    mutable std::shared_mutex use;  // of what follows; exclusive only for a moment
    std::optional<at::Device> where;
    std::unique_ptr<Device> device;

    template <class F>
    auto with(const F& f) const {
      const std::shared_lock stays(use);
      if (!device) throw_closed();
      return f(*device);
    }
    template <class F>
    void if_any(const F& f) const {
      const std::shared_lock stays(use);
      if (device) f(*device);
    }
    [[noreturn]] static void throw_closed();
  };
  cpu::Communicator& host_;
  const cpu::Config config_;
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

// One turn on a GPU, from the moment it is made: on which stream it runs, and when that may begin.
class DeviceTurn {
 public:
  // `async`: on the device's own stream, after what the current stream holds by now. Else on the current stream, if the
  // device can. The calls are prepared, see Device.
  DeviceTurn(DeviceSlot& slot, at::Device where, bool async, std::span<cpu::Call> calls);
  bool on_host() const { return on_host_; }
  c10::Stream stream() const { return stream_; }

  // The turn's parts, on its stream: the first waits for what the current stream held when the turn was made, and if it
  // throws, tells the other ranks.
  void begin(const std::function<void()>& load);
  void launch(const cpu::Call& call) const;  // where the host does not run it
  void end(const std::function<void()>& store);
  // The current stream goes on after the call. Throws what has gone wrong on the GPU, as far as it is known by now.
  void let_current_wait();
  bool ended() const;

  // The memory is in use on the call's stream, whatever stream it was made on.
  void uses(const at::Tensor& t) const;

 private:
  const std::shared_ptr<const DeviceSlot::State> slot_;
  struct Settled {
    std::shared_ptr<DeviceFailure> failure;
    c10::Stream stream;
    bool on_host;
  };
  static Settled settle(DeviceSlot& slot, at::Device where, bool async, std::span<cpu::Call> calls);
  explicit DeviceTurn(const std::shared_ptr<const DeviceSlot::State>& slot, const Settled& settled);

  const std::shared_ptr<DeviceFailure> failure_;
  const c10::Stream stream_;
  const bool on_host_, same_stream_;
  c10::Event ready_, end_;
};

// Defined by csrc/torch/cuda.
std::unique_ptr<Device> make_device(cpu::Communicator& host, const cpu::Config& config, at::Device where);

}  // namespace pycoll::bindings
