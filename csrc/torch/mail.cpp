#include "torch/mail.h"

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

const char* name(Mailing::Direction d) { return d == Mailing::Direction::kSend ? "send" : "recv"; }

Dense checked(const at::Tensor& t, Mailing::Direction direction) {
  if (direction == Mailing::Direction::kSend) {
    check_memory(t, name(direction));
  } else {
    check_writable(t, name(direction));
  }
  return Dense(t);
}

// The memory is in use there, whatever stream it was made on.
void record_use(const at::Tensor& t, c10::Stream stream) {
  try {
    c10::impl::VirtualGuardImpl(stream.device_type()).recordDataPtrOnStream(t.storage().data_ptr(), stream);
  } catch (const c10::Error&) {  // some allocators take it ill that the memory is not theirs
  }
}

template <class F>
void on_stream(const std::shared_ptr<Courier>& courier, const F& f) {
  std::optional<c10::StreamGuard> on;
  if (courier) on.emplace(courier->stream());
  f();
}

}  // namespace

#ifndef PYCOLL_WITH_CUDA
std::shared_ptr<Courier> make_courier(at::Device device) {
  throw_unsupported("a tensor on " + device.str() +
                    " was given, but this pycoll was built without CUDA: `pycoll info` says why; or move the tensor "
                    "with .cpu()");
}
#endif

Mailing::Mailing(int rank, const char* title, Direction direction, const at::Tensor& tensor)
    : Work(rank, direction == Direction::kSend ? c10d::OpType::SEND : c10d::OpType::RECV, title,
           std::vector<at::Tensor>{tensor}, {tensor}, /*turns=*/nullptr),
      direction_(direction),
      dense_(checked(tensor, direction)),
      courier_(tensor.device().is_cpu() ? nullptr : make_courier(tensor.device())) {
  if (courier_) {
    for (const at::Tensor& t : {dense_.tensor(), dense_.memory()}) record_use(t, courier_->stream());
  }
  if (direction == Direction::kSend) on_stream(courier_, [&] { dense_.load(); });
}

cpu::Message Mailing::message(int peer, int tag) const {
  const at::Tensor& memory = dense_.memory();
  return {.data = memory.mutable_data_ptr(),
          .bytes = memory.nbytes(),
          .kind = fingerprint(memory.scalar_type()),
          .peer = peer,
          .tag = tag,
          .mover = courier_.get()};
}

void Mailing::arrive() const {
  if (direction_ == Direction::kReceive) on_stream(courier_, [&] { dense_.store(); });
}

void Mailing::start(cpu::Mail& mail, int peer, int tag) {
  const auto self = c10::intrusive_ptr<Mailing>::unsafe_reclaim_from_nonowning(this);
  const auto done = [self](std::exception_ptr failure) {
    try {
      if (!failure) self->arrive();
    } catch (...) {
      failure = std::current_exception();
    }
    self->complete(failure);
  };
  request_ =
      direction_ == Direction::kSend ? mail.send(message(peer, tag), done) : mail.receive(message(peer, tag), done);
}

void Mailing::start_and_wait(cpu::Mail& mail, int peer, int tag) {
  request_ = direction_ == Direction::kSend ? mail.send(message(peer, tag)) : mail.receive(message(peer, tag));
  request_.wait();
  arrive();
  complete(nullptr);
  let_current_wait();
}

std::optional<c10::Stream> Mailing::stream() const {
  return courier_ ? std::make_optional(courier_->stream()) : std::nullopt;
}

void Mailing::let_current_wait() const {
  if (!courier_) return;
  c10::Event there(courier_->stream().device_type());
  there.record(courier_->stream());
  there.block(c10::impl::VirtualGuardImpl(courier_->stream().device_type()).getStream(courier_->stream().device()));
}

bool Mailing::isCompleted() {
  (void)request_.ended();
  return Work::isCompleted();
}

bool Mailing::wait(std::chrono::milliseconds timeout) {
  try {
    request_.wait(timeout == kNoTimeout ? std::nullopt : std::make_optional(timeout));
  } catch (const Error& e) {
    throw PyError(e);
  }
  (void)Work::wait(kNoTimeout);  // the thread that ends it may not be done with that
  let_current_wait();
  return true;
}

}  // namespace pycoll::bindings
