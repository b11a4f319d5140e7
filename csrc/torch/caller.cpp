#include "torch/caller.h"

#include <ATen/record_function.h>
#include <torch/extension.h>

#include "torch/errors.h"
#include "torch/store.h"

namespace pycoll::bindings {

namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  if (!(seconds > 0)) throw_usage("timeout must be positive, in seconds");
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(seconds, 1e9) * 1000));
}

// Where the tensors of a job lie, if not on the CPU.
std::optional<at::Device> device_of(const Job& job) {
  for (const auto* tensors : {&job.reads, &job.writes}) {
    if (!tensors->empty()) {
      const at::Device device = tensors->front().tensor().device();
      return device.is_cpu() ? std::nullopt : std::make_optional(device);
    }
  }
  return std::nullopt;
}

// What profilers show of a job: its inputs; on a rank that has none, as in a broadcast from another, its outputs.
Tensors shown(const Job& job) {
  Tensors tensors;
  for (const Dense& d : job.reads.empty() ? job.writes : job.reads) tensors.push_back(d.tensor());
  return tensors;
}

// All of a job, in its turn; `run(call)` makes a call.
template <class Run>
void carry_out(const Job& job, DeviceTurn* turn, const Run& run) {
  const auto load = [&] { job.load(); };
  const auto store = [&] { job.store(); };
  turn ? turn->begin(load) : load();
  for (const cpu::Call& call : job.calls) run(call);
  turn ? turn->end(store) : store();
}

std::function<void(std::exception_ptr)> completing(const c10::intrusive_ptr<Work>& work) {
  return [work](std::exception_ptr failure) { work->complete(failure); };
}

}  // namespace

Caller::Caller(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, const cpu::Names& names, int rank,
               int world, const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds) {
  TorchStore keys(store, key);
  comm_ = std::make_shared<cpu::Communicator>(keys, rank, world, config, milliseconds(timeout_seconds), names);
  device_ = std::make_unique<DeviceSlot>(*comm_, cuda_config);
}

Caller::~Caller() {
  std::optional<py::gil_scoped_release> no_gil;
  if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
  comm_.reset();
}

void Caller::run(const char* title, Job& job) {
  std::optional<at::RecordFunction> record;
  if (at::hasCallbacks()) {
    record.emplace(at::RecordScope::USER_SCOPE);
    std::vector<c10::IValue> inputs;
    for (const at::Tensor& t : shown(job)) inputs.emplace_back(t);
    if (record->isActive()) record->before(title, c10::ArrayRef<const c10::IValue>(inputs.data(), inputs.size()));
  }
  const std::shared_ptr<DeviceTurn> turn = prepare(job, /*async=*/false);
  block_on(job, turn.get());
}

// Checks what can be checked before the turn.
std::shared_ptr<DeviceTurn> Caller::prepare(Job& job, bool async) {
  const auto where = device_of(job);
  if (!where) {
    for (const cpu::Call& call : job.calls) comm_->check(call);
    return nullptr;
  }
  auto turn = std::make_shared<DeviceTurn>(*device_, *where, async, std::span(job.calls.data(), job.calls.size()));
  for (const auto* tensors : {&job.reads, &job.writes}) {  // also if it fails, with moves still on the stream
    for (const Dense& d : *tensors) {
      if (d.tensor().device() != *where) throw_usage("a collective's tensors must lie on one device");
      turn->uses(d.tensor());
      turn->uses(d.memory());
    }
  }
  return turn;
}

void Caller::block_on(const Job& job, DeviceTurn* turn) {
  if (turn && !turn->on_host()) {
    carry_out(job, turn, [turn](const cpu::Call& call) { turn->launch(call); });
  } else {
    comm_->run([&](const cpu::Communicator::Runner& run) { carry_out(job, turn, run); });
  }
  if (turn) turn->let_current_wait();
}

c10::intrusive_ptr<Work> Caller::work_for(c10d::OpType type, const char* title, const Tensors& inputs, Tensors result,
                                          std::shared_ptr<DeviceTurn> turn) {
  // A title makes a record even if nobody looks.
  return c10::make_intrusive<Work>(seat().rank, type, at::hasCallbacks() ? title : nullptr, inputs, std::move(result),
                                   comm_->turns(), std::move(turn));
}

c10::intrusive_ptr<Work> Caller::start(c10d::OpType type, const char* title, Job job, bool async) {
  const Tensors inputs = shown(job);
  const std::shared_ptr<DeviceTurn> turn = prepare(job, async);
  auto work = work_for(type, title, inputs, job.result, turn);
  if (!async) {
    block_on(job, turn.get());
    work->complete(nullptr);
  } else if (turn && !turn->on_host()) {
    carry_out(job, turn.get(), [&turn](const cpu::Call& call) { turn->launch(call); });
    work->complete(nullptr);
  } else {
    const auto shared = std::make_shared<const Job>(std::move(job));
    comm_->enqueue([shared, turn](const cpu::Communicator::Runner& run) { carry_out(*shared, turn.get(), run); },
                   completing(work));
  }
  return work;
}

c10::intrusive_ptr<Work> Caller::start(c10d::OpType type, const char* title, Tensors tensors,
                                       cpu::Communicator::Turn turn, bool async) {
  auto work = work_for(type, title, tensors, tensors);
  if (async) {
    comm_->enqueue(std::move(turn), completing(work));
  } else {
    comm_->run(turn);
    work->complete(nullptr);
  }
  return work;
}

c10::intrusive_ptr<Mailing> Caller::mail(Mailing::Direction direction, const at::Tensor& tensor, int peer, int tag,
                                         bool async) {
  const bool sends = direction == Mailing::Direction::kSend;
  const char* title = sends ? "pycoll:send" : peer == cpu::kAnySource ? "pycoll:recvAnySource" : "pycoll:recv";
  auto mailing = c10::make_intrusive<Mailing>(seat().rank, at::hasCallbacks() ? title : nullptr, direction, tensor);
  if (async) {
    mailing->start(comm_->mail(), peer, tag);
  } else {
    mailing->start_and_wait(comm_->mail(), peer, tag);
  }
  return mailing;
}

}  // namespace pycoll::bindings
