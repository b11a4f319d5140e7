#include "torch/device.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#ifdef PYCOLL_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include "cpu/log.h"
#include "torch/errors.h"

namespace pycoll::bindings {

DeviceSlot::DeviceSlot(cpu::Communicator& host, const cpu::Config& config) : host_(host), config_(config) {
  host.on_close([state = state_] {
    const std::lock_guard met(state->meeting);  // a meeting under way ends soon: no call of the host's runs any more
    std::unique_ptr<Device> device;
    {
      const std::unique_lock no_user(state->use);
      device = std::move(state->device);
    }
    device.reset();  // without the lock: it frees memory, for which torch's allocator has a lock of its own
  });
}

void DeviceSlot::State::throw_closed() {
  throw Error(ErrorKind::kError, "pycoll: the communicator is closed, or its ranks have not met on a GPU");
}

bool DeviceSlot::has_device() const {
  const std::shared_lock stays(state_->use);
  return state_->device != nullptr;
}

void DeviceSlot::meet(at::Device device) {
  if (!device.is_cuda()) throw_unsupported("pycoll communicates CPU and CUDA tensors, none on " + device.str());
  const std::lock_guard guard(state_->meeting);
  if (host_.closed()) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  if (!has_device()) {
#ifdef PYCOLL_WITH_CUDA
    std::unique_ptr<Device> made = make_device(host_, config_, device);
    cpu::log(cpu::LogLevel::kInfo, host_.names(), host_.rank(), host_.world(),
             [&] { return "on GPUs: " + made->describe(); });
    const std::unique_lock no_user(state_->use);
    state_->where = device;
    state_->device = std::move(made);
#else
    throw_unsupported("a tensor on " + device.str() +
                      " was given, but this pycoll was built without CUDA: `pycoll info` says why; or move the tensor "
                      "with .cpu()");
#endif
  }
  if (*state_->where != device) {
    throw_usage("this communicator's ranks have met on " + state_->where->str() + ", and a tensor on " + device.str() +
                " was given: a rank has one GPU");
  }
}

std::function<at::Tensor(int64_t)> DeviceSlot::allocator(at::Device device) {
  meet(device);
  if (with([](const Device& d) { return d.on_host(); })) return nullptr;
  return [state = state_, device](int64_t bytes) {
    const auto options = at::TensorOptions().dtype(at::kByte).device(device);
    return state->with([&](Device& d) { return d.empty({bytes}, options); });
  };
}

namespace {
c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }
}  // namespace

void DeviceFailure::set(std::exception_ptr what) {
  const std::lock_guard guard(lock_);
  if (!what_) what_ = what;
}

void DeviceFailure::throw_if_any() const {
  const std::lock_guard guard(lock_);
  if (what_) std::rethrow_exception(what_);
}

DeviceTurn::Settled DeviceTurn::settle(DeviceSlot& slot, at::Device where, bool async, std::span<cpu::Call> calls) {
  slot.meet(where);
  return slot.with([&](Device& device) {
    device.failure()->throw_if_any();
    for (cpu::Call& call : calls) device.prepare(call);
    const bool own = async || device.on_host();
    return Settled{device.failure(), own ? device.stream() : current_stream(where), device.on_host()};
  });
}

DeviceTurn::DeviceTurn(DeviceSlot& slot, at::Device where, bool async, std::span<cpu::Call> calls)
    : DeviceTurn(slot.state_, settle(slot, where, async, calls)) {}

DeviceTurn::DeviceTurn(const std::shared_ptr<const DeviceSlot::State>& slot, const Settled& settled)
    : slot_(slot),
      failure_(settled.failure),
      stream_(settled.stream),
      on_host_(settled.on_host),
      same_stream_(stream_ == current_stream(stream_.device())),
      ready_(stream_.device_type()),
      end_(stream_.device_type()) {
  if (!same_stream_) ready_.record(current_stream(stream_.device()));
}

void DeviceTurn::begin(const std::function<void()>& load) {
  try {
    const c10::StreamGuard on(stream_);
    if (!same_stream_) ready_.block(stream_);
    load();
  } catch (const std::exception& e) {  // the others must not wait for a call that is not launched
    const auto* of_torch = dynamic_cast<const c10::Error*>(&e);
    std::string why = of_torch ? of_torch->what_without_backtrace() : e.what();
    if (why.empty()) why = "an exception of Python's";
    slot_->if_any([&](Device& device) { device.fail("reading its tensors failed: " + why); });
    throw;
  }
}

void DeviceTurn::launch(const cpu::Call& call) const {
  const c10::StreamGuard on(stream_);
  slot_->with([&](Device& device) { device.launch(call); });
}

void DeviceTurn::end(const std::function<void()>& store) {
  const c10::StreamGuard on(stream_);
  store();
  end_.record(stream_);
}

void DeviceTurn::let_current_wait() {
  const c10::Stream current = current_stream(stream_.device());
  if (current != stream_) end_.block(current);
  failure_->throw_if_any();
}

bool DeviceTurn::ended() const {
#ifdef PYCOLL_WITH_CUDA
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
#endif
  return end_.query();
}

void DeviceTurn::uses(const at::Tensor& t) const {
  try {
    c10::impl::VirtualGuardImpl(stream_.device_type()).recordDataPtrOnStream(t.storage().data_ptr(), stream_);
  } catch (const c10::Error&) {  // some allocators take it ill that the memory is not theirs
  }
}

}  // namespace pycoll::bindings
