#include "torch/backend.h"

#include <torch/extension.h>

#include <mutex>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "torch/errors.h"
#include "torch/modules.h"
#include "torch/store.h"
#include "torch/work.h"

namespace pycoll::bindings {

namespace {

ReduceOp op_of(const c10d::ReduceOp& op) {
  switch (static_cast<c10d::ReduceOp::RedOpType>(op)) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::kSum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::kAvg;
    case c10d::ReduceOp::MIN:
      return ReduceOp::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOp::kMax;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::kProduct;
    default:
      throw_unsupported("torch.distributed's reduce op number " +
                        std::to_string(static_cast<int>(static_cast<c10d::ReduceOp::RedOpType>(op))) +
                        " is not there: SUM, AVG, MIN, MAX and PRODUCT are");
  }
}

template <class T>
const T& only(const std::vector<T>& list, const char* collective) {
  if (list.size() != 1) {
    throw_unsupported(std::string(collective) + " takes one tensor a call, not " + std::to_string(list.size()));
  }
  return list[0];
}

struct Alive {
  std::mutex lock;
  std::vector<std::weak_ptr<cpu::Communicator>> groups;
};
Alive& alive() {
  static auto* a = new Alive;  // never destroyed: groups may outlive static destruction
  return *a;
}

}  // namespace

// A call with the memory it reads and writes, and what its future brings.
struct Job {
  cpu::Call call;
  std::vector<Dense> reads, writes;
  std::vector<at::Tensor> result;

  void load() const {
    for (const Dense& d : reads) d.load();
  }
  void store() const {
    for (const Dense& d : writes) d.store();
  }
};

namespace {

// Tensors of the size of `like` as the rows of `whole`.
std::vector<Dense> rows_for(const std::vector<at::Tensor>& blocks, const at::Tensor& whole, const at::Tensor& like,
                            const char* collective) {
  if (static_cast<int64_t>(blocks.size()) != whole.size(0)) {
    throw_usage(std::string(collective) + " needs a list of " + std::to_string(whole.size(0)) + " tensors, not of " +
                std::to_string(blocks.size()));
  }
  std::vector<Dense> dense;
  for (size_t r = 0; r < blocks.size(); ++r) {
    check_memory(blocks[r], collective);
    if (blocks[r].scalar_type() != like.scalar_type()) {
      throw_usage(std::string(collective) + ": input and output tensors must have one dtype");
    }
    if (blocks[r].numel() != like.numel()) {
      throw_unsupported(std::string(collective) + " of tensors of different sizes is not there yet");
    }
    dense.emplace_back(blocks[r], whole[static_cast<int64_t>(r)].view(blocks[r].sizes()));
  }
  return dense;
}

Job all_gather_job(const Dense& in, const at::Tensor& whole, const std::vector<Dense>& writes,
                   const std::vector<at::Tensor>& result) {
  const Elements e = elements_to_copy(in.memory());
  const cpu::Call call{.collective = Collective::kAllGather,
                       .dtype = e.dtype,
                       .in = in.memory().const_data_ptr(),
                       .out = whole.mutable_data_ptr(),
                       .count = e.count,
                       .shape = fingerprint(whole.scalar_type())};
  return {call, {in}, writes, result};
}

Job reduce_scatter_job(const std::vector<Dense>& reads, const at::Tensor& whole, const Dense& out,
                       const c10d::ReduceOp& op) {
  const cpu::Call call{.collective = Collective::kReduceScatter,
                       .dtype = reducible(whole, "reduce_scatter"),
                       .op = op_of(op),
                       .in = whole.const_data_ptr(),
                       .out = out.memory().mutable_data_ptr(),
                       .count = static_cast<size_t>(whole.numel())};
  return {call, reads, {out}, {out.tensor()}};
}

}  // namespace

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Config& config,
                 const cpu::Config& cuda_config, std::chrono::milliseconds timeout)
    : c10d::Backend(rank, world) {
  TorchStore keys(store, "group");
  comm_ = std::make_shared<cpu::Communicator>(keys, rank, world, config, timeout);
  device_ = std::make_unique<DeviceSlot>(*comm_, cuda_config);
  const std::lock_guard guard(alive().lock);
  std::erase_if(alive().groups, [](const auto& group) { return group.expired(); });
  alive().groups.push_back(comm_);
}

Backend::~Backend() {
  // Closing waits for the worker, which may need Python's lock for a future's callbacks.
  std::optional<py::gil_scoped_release> no_gil;
  if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
  comm_.reset();
}

void Backend::close_all() {
  std::vector<std::shared_ptr<cpu::Communicator>> open;
  {
    const std::lock_guard guard(alive().lock);
    for (const auto& group : alive().groups) open.push_back(group.lock());
  }
  std::exception_ptr interrupted;
  for (const auto& group : open) {  // without the lock: a callback may drop a group, or create one
    try {
      if (group) group->close();
    } catch (...) {
      interrupted = std::current_exception();
    }
  }
  if (interrupted) std::rethrow_exception(interrupted);
}

Backend::Work Backend::submit(c10d::OpType type, Job job, bool async) {
  ++calls_;
  try {
    for (const auto* tensors : {&job.reads, &job.writes}) {
      if (!tensors->empty() && !tensors->front().tensor().is_cpu())
        return submit_on_device(type, std::move(job), async);
    }
    auto work = c10::make_intrusive<bindings::Work>(getRank(), type, job.result, comm_->turn());
    if (!async) {
      comm_->run(job.call, [&] { job.load(); }, [&] { job.store(); });
      work->complete(nullptr);
      return work;
    }
    const cpu::Call call = job.call;
    const auto shared = std::make_shared<const Job>(std::move(job));
    const auto load = [shared] { shared->load(); };
    comm_->enqueue(call, load, completing(work, [shared] { shared->store(); }));
    return work;
  } catch (const Error& e) {
    throw PyError(e);
  }
}

// A callback that finishes the call, if it went well, and ends the work.
std::function<void(std::exception_ptr)> Backend::completing(const c10::intrusive_ptr<bindings::Work>& work,
                                                            const std::function<void()>& finish) {
  return [work, finish](std::exception_ptr failure) {
    try {
      if (!failure) finish();
    } catch (...) {
      failure = std::current_exception();
    }
    work->complete(failure);
  };
}

Backend::Work Backend::submit_on_device(c10d::OpType type, Job job, bool async) {
  const at::Device where = (job.reads.empty() ? job.writes : job.reads).front().tensor().device();
  const auto turn = std::make_shared<DeviceTurn>(*device_, where, async, job.call);
  auto work = c10::make_intrusive<bindings::Work>(getRank(), type, job.result, comm_->turn(), turn);
  for (const auto* tensors : {&job.reads, &job.writes}) {
    for (const Dense& d : *tensors) {
      if (d.tensor().device() != where) throw_usage("a collective's tensors must lie on one device");
      turn->uses(d.tensor());
      turn->uses(d.memory());
    }
  }
  const cpu::Call call = job.call;
  const auto shared = std::make_shared<const Job>(std::move(job));
  const auto load = [shared, turn] { turn->begin([&] { shared->load(); }); };
  const auto store = [shared, turn] { turn->end([&] { shared->store(); }); };
  if (turn->on_host() && async) {
    comm_->enqueue(call, load, completing(work, store));
    return work;
  }
  if (turn->on_host()) {
    comm_->run(call, load, store);
  } else {
    load();
    turn->launch(call);
    store();
  }
  work->complete(nullptr);
  if (!async) turn->let_current_wait();
  return work;
}

bool Backend::supportsTensorAlloc([[maybe_unused]] c10::DeviceIndex device) {
#ifdef PYCOLL_WITH_CUDA
  return device >= 0 && at::hasCUDA();
#else
  return false;
#endif
}

at::Tensor Backend::allocateTensor(long size, at::TensorOptions options) {
  if (options.device().is_cpu()) return at::empty({size}, options);
  try {
    device_->meet(options.device());
    return device_->with([&](Device& d) { return d.empty({size}, options); });
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  check_writable(x, "all_reduce");
  const Dense dense(x);
  void* data = dense.memory().mutable_data_ptr();
  const cpu::Call call{.collective = Collective::kAllReduce,
                       .dtype = reducible(x, "all_reduce"),
                       .op = op_of(options.reduceOp),
                       .in = data,
                       .out = data,
                       .count = static_cast<size_t>(x.numel()),
                       .shape = fingerprint(x.scalar_type())};
  return submit(c10d::OpType::ALLREDUCE, {call, {dense}, {dense}, tensors}, options.asyncOp);
}

Backend::Work Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& x = only(tensors, "broadcast");
  check_writable(x, "broadcast");
  if (options.rootRank < 0 || options.rootRank >= getSize()) {
    throw_usage("broadcast: root " + std::to_string(options.rootRank) + " is not in a group of " +
                std::to_string(getSize()));
  }
  const Dense dense(x);
  void* data = dense.memory().mutable_data_ptr();
  const Elements e = elements_to_copy(x);
  const cpu::Call call{.collective = Collective::kBroadcast,
                       .dtype = e.dtype,
                       .root = static_cast<int>(options.rootRank),
                       .in = data,
                       .out = data,
                       .count = e.count,
                       .shape = fingerprint(x.scalar_type())};
  return submit(c10d::OpType::BROADCAST, {call, {dense}, {dense}, tensors}, options.asyncOp);
}

Backend::Work Backend::allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  const at::Tensor& x = only(inputs, "all_gather");
  const Tensors& blocks = only(outputs, "all_gather");
  check_memory(x, "all_gather");
  for (const at::Tensor& block : blocks) check_writable(block, "all_gather");
  const at::Tensor whole = at::empty({getSize(), x.numel()}, x.options());
  const std::vector<Dense> spread = rows_for(blocks, whole, x, "all_gather");
  return submit(c10d::OpType::ALLGATHER, all_gather_job(Dense(x), whole, spread, blocks), options.asyncOp);
}

Backend::Work Backend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  check_memory(input, "all_gather_into_tensor");
  check_writable(output, "all_gather_into_tensor");
  if (output.numel() != input.numel() * getSize() || output.scalar_type() != input.scalar_type()) {
    throw_usage(c10::str("all_gather_into_tensor: the output must hold ", getSize(), " inputs of ", input.numel(), " ",
                         input.scalar_type(), " elements"));
  }
  const Dense in(input), out(output);
  check_overlap(in.memory(), out.memory(), getRank(), "all_gather_into_tensor");
  return submit(c10d::OpType::_ALLGATHER_BASE, all_gather_job(in, out.memory(), {out}, {output}), options.asyncOp);
}

Backend::Work Backend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& options) {
  const at::Tensor& output = only(outputs, "reduce_scatter");
  const Tensors& blocks = only(inputs, "reduce_scatter");
  check_writable(output, "reduce_scatter");
  const at::Tensor whole = at::empty({getSize(), output.numel()}, output.options());
  const std::vector<Dense> reads = rows_for(blocks, whole, output, "reduce_scatter");
  return submit(c10d::OpType::REDUCE_SCATTER, reduce_scatter_job(reads, whole, Dense(output), options.reduceOp),
                options.asyncOp);
}

Backend::Work Backend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                            const c10d::ReduceScatterOptions& options) {
  check_memory(input, "reduce_scatter_tensor");
  check_writable(output, "reduce_scatter_tensor");
  if (input.numel() != output.numel() * getSize() || output.scalar_type() != input.scalar_type()) {
    throw_usage(c10::str("reduce_scatter_tensor: the input must hold ", getSize(), " outputs of ", output.numel(), " ",
                         output.scalar_type(), " elements"));
  }
  const Dense in(input), out(output);
  check_overlap(in.memory(), out.memory(), getRank(), "reduce_scatter_tensor");
  return submit(c10d::OpType::_REDUCE_SCATTER_BASE, reduce_scatter_job({in}, in.memory(), out, options.reduceOp),
                options.asyncOp);
}

Backend::Work Backend::barrier(const c10d::BarrierOptions& options) {
  return submit(c10d::OpType::BARRIER, {{.collective = Collective::kBarrier}, {}, {}, {}}, options.asyncOp);
}

namespace {
[[noreturn]] void not_yet(const char* collective) {
  throw_unsupported(
      std::string(collective) +
      " is not there yet in this backend: all_reduce, broadcast, all_gather, reduce_scatter and barrier are");
}
}  // namespace

Backend::Work Backend::allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) { not_yet("sparse all_reduce"); }
Backend::Work Backend::allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) {
  not_yet("all_reduce_coalesced");
}
Backend::Work Backend::reduce(Tensors&, const c10d::ReduceOptions&) { not_yet("reduce"); }
Backend::Work Backend::allgather_coalesced(TensorLists&, Tensors&, const c10d::AllgatherOptions&) {
  not_yet("all_gather_coalesced");
}
Backend::Work Backend::allgather_into_tensor_coalesced(Tensors&, Tensors&, const c10d::AllgatherOptions&) {
  not_yet("all_gather_into_tensor_coalesced");
}
Backend::Work Backend::gather(TensorLists&, Tensors&, const c10d::GatherOptions&) { not_yet("gather"); }
Backend::Work Backend::scatter(Tensors&, TensorLists&, const c10d::ScatterOptions&) { not_yet("scatter"); }
Backend::Work Backend::reduce_scatter_tensor_coalesced(Tensors&, Tensors&, const c10d::ReduceScatterOptions&) {
  not_yet("reduce_scatter_tensor_coalesced");
}
Backend::Work Backend::alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                                     const c10d::AllToAllOptions&) {
  not_yet("all_to_all_single");
}
Backend::Work Backend::alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) { not_yet("all_to_all"); }
Backend::Work Backend::send(Tensors&, int, int) { not_yet("send"); }
Backend::Work Backend::recv(Tensors&, int, int) { not_yet("recv"); }
Backend::Work Backend::recvAnysource(Tensors&, int) { not_yet("recv from any source"); }
void Backend::monitoredBarrier(const c10d::BarrierOptions&, bool) { not_yet("monitored_barrier"); }

void bind_backend(py::module_& m) {
  m.def("close_backends", &Backend::close_all, "Drains and closes every group.",
        py::call_guard<py::gil_scoped_release>());
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend>(m, "Backend",
                                                                  "The c10d backend; see pycoll/backend.py.")
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Config& config,
                       const cpu::Config& cuda_config, double timeout_seconds) {
             const py::gil_scoped_release no_gil;
             return c10::make_intrusive<Backend>(
                 store, rank, world, config, cuda_config,
                 std::chrono::milliseconds(static_cast<int64_t>(std::min(timeout_seconds, 1e9) * 1000)));
           }),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("config"), py::arg("cuda_config"),
           py::arg("timeout"));
}

}  // namespace pycoll::bindings
