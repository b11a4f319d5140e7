#include "torch/device.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include "torch/errors.h"

namespace pycoll::bindings {

DeviceSlot::DeviceSlot(cpu::Communicator& host, const cpu::Config& config) : host_(host), config_(config) {
  host.on_close([state = state_] {
    const std::lock_guard guard(state->lock);
    state->device.reset();
  });
}

Device& DeviceSlot::at(at::Device device) {
  if (!device.is_cuda()) throw_unsupported("pycoll communicates CPU and CUDA tensors, none on " + device.str());
  const std::lock_guard guard(state_->lock);
  if (host_.closed()) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  if (!state_->device) {
#ifdef PYCOLL_WITH_CUDA
    state_->device = make_device(host_, config_, device);
#else
    throw_unsupported("a tensor on " + device.str() +
                      " was given, but this pycoll was built without CUDA: `pycoll info` says why; or move the tensor "
                      "with .cpu()");
#endif
    state_->where = device;
  }
  if (*state_->where != device) {
    throw_usage("this communicator's ranks have met on " + state_->where->str() + ", and a tensor on " + device.str() +
                " was given: a rank has one GPU");
  }
  return *state_->device;
}

std::function<at::Tensor(int64_t)> DeviceSlot::allocator(at::Device device) {
  if (at(device).on_host()) return nullptr;
  return [state = state_, device](int64_t bytes) {
    const std::lock_guard guard(state->lock);
    if (!state->device) throw Error(ErrorKind::kError, "pycoll: the communicator of this memory pool is closed");
    return state->device->empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
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

DeviceTurn::DeviceTurn(DeviceSlot& slot, at::Device where, bool async)
    : device_(slot.at(where)),
      failure_(device_.failure()),
      stream_(async || device_.on_host() ? device_.stream() : current_stream(where)),
      same_stream_(stream_ == current_stream(where)),
      ready_(where.type()),
      end_(where.type()) {
  failure_->throw_if_any();
  if (!same_stream_) ready_.record(current_stream(where));
}

void DeviceTurn::begin(const std::function<void()>& load) {
  const c10::StreamGuard on(stream_);
  if (!same_stream_) ready_.block(stream_);
  load();
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

void DeviceTurn::uses(const at::Tensor& t) const {
  c10::impl::VirtualGuardImpl(stream_.device_type()).recordDataPtrOnStream(t.storage().data_ptr(), stream_);
}

}  // namespace pycoll::bindings
