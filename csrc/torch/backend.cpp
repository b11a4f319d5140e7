#include "torch/backend.h"

#include <torch/extension.h>

#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

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

}  // namespace

namespace {

struct Alive {
  std::mutex lock;
  std::set<Backend*> backends;
};
Alive& alive() {
  static auto* a = new Alive;  // never destroyed: groups may outlive static destruction
  return *a;
}

}  // namespace

// A call with all it needs until it has ended.
struct Backend::Job {
  cpu::Call call;
  std::vector<at::Tensor> keep;  // what the call reads and writes
  std::function<void()> after;   // then, in the thread that ran it
  std::vector<at::Tensor> result;
};

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Config& config,
                 std::chrono::milliseconds timeout)
    : c10d::Backend(rank, world) {
  TorchStore keys(store, "group");
  comm_ = std::make_unique<cpu::Communicator>(keys, rank, world, config, timeout);
  const std::lock_guard guard(alive().lock);
  alive().backends.insert(this);
}

Backend::~Backend() {
  // Closing waits for the worker, which may need Python's lock for a future's callbacks.
  std::optional<py::gil_scoped_release> no_gil;
  if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
  {
    const std::lock_guard guard(alive().lock);
    alive().backends.erase(this);
  }
  comm_.reset();
}

void Backend::close_all() {
  const std::lock_guard guard(alive().lock);
  for (Backend* b : alive().backends) b->comm_->close();
}

Backend::Work Backend::submit(c10d::OpType type, Job job, bool async) {
  ++calls_;
  auto work = c10::make_intrusive<bindings::Work>(getRank(), type, job.result);
  try {
    if (!async) {
      comm_->run(job.call);
      if (job.after) job.after();
      work->complete(nullptr);
      return work;
    }
    const cpu::Call call = job.call;
    comm_->enqueue(call, [work, job = std::move(job)](std::exception_ptr failure) {
      try {
        if (!failure && job.after) job.after();
      } catch (...) {
        failure = std::current_exception();
      }
      work->complete(failure);
    });
  } catch (const Error& e) {
    throw PyError(e);
  }
  return work;
}

Backend::Work Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  check_memory(x, "all_reduce");
  const Output out(x, /*keep_content=*/true);
  void* data = out.dense().mutable_data_ptr();
  const cpu::Call call{.collective = Collective::kAllReduce,
                       .dtype = reducible(x, "all_reduce"),
                       .op = op_of(options.reduceOp),
                       .in = data,
                       .out = data,
                       .count = static_cast<size_t>(x.numel())};
  return submit(c10d::OpType::ALLREDUCE, {call, {out.dense()}, [out] { out.finish(); }, tensors}, options.asyncOp);
}

Backend::Work Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& x = only(tensors, "broadcast");
  check_memory(x, "broadcast");
  const Output out(x, /*keep_content=*/true);
  void* data = out.dense().mutable_data_ptr();
  const Elements e = elements_to_copy(x);
  const cpu::Call call{.collective = Collective::kBroadcast,
                       .dtype = e.dtype,
                       .root = static_cast<int>(options.rootRank),
                       .in = data,
                       .out = data,
                       .count = e.count};
  return submit(c10d::OpType::BROADCAST, {call, {out.dense()}, [out] { out.finish(); }, tensors}, options.asyncOp);
}

Backend::Work Backend::allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  const at::Tensor x = only(inputs, "all_gather").contiguous();
  const std::vector<at::Tensor> blocks = only(outputs, "all_gather");
  check_memory(x, "all_gather");
  if (blocks.size() != static_cast<size_t>(getSize())) {
    throw_usage("all_gather needs a list of " + std::to_string(getSize()) + " tensors, not of " +
                std::to_string(blocks.size()));
  }
  for (const at::Tensor& block : blocks) {
    check_memory(block, "all_gather");
    if (block.scalar_type() != x.scalar_type())
      throw_usage("all_gather: the output tensors must have the input's dtype");
    if (block.numel() != x.numel()) throw_unsupported("all_gather into tensors of different sizes is not there yet");
  }
  const at::Tensor whole = at::empty({static_cast<int64_t>(blocks.size()), x.numel()}, x.options());
  const Elements e = elements_to_copy(x);
  const cpu::Call call{.collective = Collective::kAllGather,
                       .dtype = e.dtype,
                       .in = x.const_data_ptr(),
                       .out = whole.mutable_data_ptr(),
                       .count = e.count};
  const auto spread = [whole, blocks] {
    const at::NoGradGuard no_grad;
    for (size_t r = 0; r < blocks.size(); ++r) blocks[r].copy_(whole[static_cast<int64_t>(r)].view_as(blocks[r]));
  };
  return submit(c10d::OpType::ALLGATHER, {call, {x, whole}, spread, blocks}, options.asyncOp);
}

Backend::Work Backend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  check_memory(input, "all_gather_into_tensor");
  check_memory(output, "all_gather_into_tensor");
  if (output.numel() != input.numel() * getSize() || output.scalar_type() != input.scalar_type()) {
    throw_usage(c10::str("all_gather_into_tensor: the output must hold ", getSize(), " inputs of ", input.numel(), " ",
                         input.scalar_type(), " elements"));
  }
  const at::Tensor x = input.contiguous();
  const Output out(output, /*keep_content=*/false);
  const Elements e = elements_to_copy(x);
  const cpu::Call call{.collective = Collective::kAllGather,
                       .dtype = e.dtype,
                       .in = x.const_data_ptr(),
                       .out = out.dense().mutable_data_ptr(),
                       .count = e.count};
  return submit(c10d::OpType::_ALLGATHER_BASE, {call, {x, out.dense()}, [out] { out.finish(); }, {output}},
                options.asyncOp);
}

Backend::Work Backend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& options) {
  at::Tensor output = only(outputs, "reduce_scatter");
  const std::vector<at::Tensor>& blocks = only(inputs, "reduce_scatter");
  if (blocks.size() != static_cast<size_t>(getSize())) {
    throw_usage("reduce_scatter needs a list of " + std::to_string(getSize()) + " tensors, not of " +
                std::to_string(blocks.size()));
  }
  std::vector<at::Tensor> flat;
  for (const at::Tensor& block : blocks) {
    check_memory(block, "reduce_scatter");
    if (block.numel() != output.numel())
      throw_unsupported("reduce_scatter of tensors of different sizes is not there yet");
    flat.push_back(block.reshape({-1}));
  }
  at::Tensor whole = at::cat(flat);
  return _reduce_scatter_base(output, whole, options);
}

Backend::Work Backend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                            const c10d::ReduceScatterOptions& options) {
  check_memory(input, "reduce_scatter_tensor");
  check_memory(output, "reduce_scatter_tensor");
  if (input.numel() != output.numel() * getSize() || output.scalar_type() != input.scalar_type()) {
    throw_usage(c10::str("reduce_scatter_tensor: the input must hold ", getSize(), " outputs of ", output.numel(), " ",
                         output.scalar_type(), " elements"));
  }
  const at::Tensor x = input.contiguous();
  const Output out(output, /*keep_content=*/false);
  const cpu::Call call{.collective = Collective::kReduceScatter,
                       .dtype = reducible(x, "reduce_scatter"),
                       .op = op_of(options.reduceOp),
                       .in = x.const_data_ptr(),
                       .out = out.dense().mutable_data_ptr(),
                       .count = static_cast<size_t>(x.numel())};
  return submit(c10d::OpType::_REDUCE_SCATTER_BASE, {call, {x, out.dense()}, [out] { out.finish(); }, {output}},
                options.asyncOp);
}

Backend::Work Backend::barrier(const c10d::BarrierOptions& options) {
  return submit(c10d::OpType::BARRIER, {{.collective = Collective::kBarrier}, {}, nullptr, {}}, options.asyncOp);
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
                       double timeout_seconds) {
             const py::gil_scoped_release no_gil;
             return c10::make_intrusive<Backend>(
                 store, rank, world, config,
                 std::chrono::milliseconds(static_cast<int64_t>(std::min(timeout_seconds, 1e9) * 1000)));
           }),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("config"), py::arg("timeout"));
}

}  // namespace pycoll::bindings
