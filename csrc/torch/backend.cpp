#include "torch/backend.h"

#include <torch/extension.h>

#include <algorithm>
#include <mutex>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "torch/errors.h"
#include "torch/gil.h"
#include "torch/modules.h"
#include "torch/sparse.h"

namespace pycoll::bindings {

using c10d::OpType;

namespace {

Reduction reduction_of(const c10d::ReduceOp& op) {
  switch (static_cast<c10d::ReduceOp::RedOpType>(op)) {
    case c10d::ReduceOp::SUM:
      return {ReduceOp::kSum};
    case c10d::ReduceOp::AVG:
      return {ReduceOp::kAvg};
    case c10d::ReduceOp::MIN:
      return {ReduceOp::kMin};
    case c10d::ReduceOp::MAX:
      return {ReduceOp::kMax};
    case c10d::ReduceOp::PRODUCT:
      return {ReduceOp::kProduct};
    case c10d::ReduceOp::BAND:
      return {ReduceOp::kBand};
    case c10d::ReduceOp::BOR:
      return {ReduceOp::kBor};
    case c10d::ReduceOp::BXOR:
      return {ReduceOp::kBxor};
    case c10d::ReduceOp::PREMUL_SUM: {
      const auto* by = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
      if (by == nullptr)
        throw_usage("PREMUL_SUM without a factor: make it with torch.distributed._make_nccl_premul_sum");
      return {ReduceOp::kSum, by->tensor_factor.defined() ? by->tensor_factor : at::scalar_tensor(by->double_factor)};
    }
    default:
      throw_unsupported("torch.distributed's reduce op number " +
                        std::to_string(static_cast<int>(static_cast<c10d::ReduceOp::RedOpType>(op))) + " is not there");
  }
}

template <class T>
const T& only(const std::vector<T>& list, const char* collective) {
  if (list.size() != 1) {
    throw_unsupported(std::string(collective) + " takes one tensor a call, not " + std::to_string(list.size()));
  }
  return list[0];
}

void check_lengths(const Tensors& a, const Tensors& b, const char* collective) {
  if (a.size() == b.size() && !a.empty()) return;
  throw_usage(c10::str(collective, " needs as many outputs as inputs, not ", a.size(), " and ", b.size()));
}

// `job(i)` for each of `count`, one after another.
template <class MakeJob>
Job in_turn(size_t count, const MakeJob& job) {
  Job all;
  for (size_t i = 0; i < count; ++i) all.append(job(i));
  return all;
}

struct Alive {
  std::mutex lock;
  std::vector<std::weak_ptr<cpu::Communicator>> groups;
};
Alive& alive() {
  static auto* a = new Alive;  // never destroyed: groups may outlive static destruction
  return *a;
}

// With what pycoll/tuning.py decides for so many ranks.
c10::intrusive_ptr<c10d::Backend> make_group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world,
                                             const c10d::Backend::Options& options, GlobalRanks global_ranks) {
  cpu::Config config, cuda_config;
  {
    const py::gil_scoped_acquire gil;
    const py::tuple both = py::module_::import("pycoll.backend").attr("configs")(world);
    config = both[0].cast<cpu::Config>();
    cuda_config = both[1].cast<cpu::Config>();
  }
  const GilReleased no_gil;
  try {
    return c10::make_intrusive<Backend>(store, rank, world, "group " + options.group_name, config, cuda_config,
                                        std::chrono::duration<double>(options.timeout).count(),
                                        std::move(global_ranks));
  } catch (const Error& e) {
    throw PyError(e);
  }
}

}  // namespace

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const std::string& label,
                 const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds,
                 GlobalRanks global_ranks)
    : c10d::Backend(rank, world),
      caller_(store, "group", label, rank, world, config, cuda_config, timeout_seconds),
      global_ranks_(std::move(global_ranks)) {
  const std::lock_guard guard(alive().lock);
  std::erase_if(alive().groups, [](const auto& group) { return group.expired(); });
  alive().groups.push_back(caller_.shared_comm());
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

c10::intrusive_ptr<c10d::Backend::Options> Backend::getBackendOptions() {
  auto options = c10::make_intrusive<BackendOptions>(caller_.comm().timeout());
  options->group_name = getGroupUid();
  options->global_ranks_in_group = global_ranks_;
  return options;
}

c10::intrusive_ptr<c10d::Backend> Backend::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                 const std::vector<int>& ranks,
                                                 const c10::intrusive_ptr<Options>& options) {
  const auto me = std::find(ranks.begin(), ranks.end(), getRank());
  if (me == ranks.end()) return {};
  if (store == split_on_) {
    if (auto again = split_off_.lock()) return again;
  }
  GlobalRanks global_ranks;
  for (const int r : ranks) global_ranks.push_back(global_ranks_.empty() ? r : global_ranks_.at(r));
  auto group = make_group(store, static_cast<int>(me - ranks.begin()), static_cast<int>(ranks.size()), *options,
                          std::move(global_ranks));
  split_on_ = store;
  split_off_ = group;
  return group;
}

c10::intrusive_ptr<c10d::Backend> Backend::merge(const c10::intrusive_ptr<c10d::Store>& store,
                                                 const c10::intrusive_ptr<Options>& options, const int& rank,
                                                 const int& size) {
  return make_group(store, rank, size, *options, {});
}

template <class CallOptions, class MakeJob>
Backend::Work Backend::submit(OpType type, const char* title, const CallOptions& options, const MakeJob& make_job) {
  ++calls_;
  try {
    Job job = make_job();
    for (cpu::Call& call : job.calls) call.timeout = options.timeout;
    return caller_.start(type, title, std::move(job), options.asyncOp);
  } catch (const Error& e) {
    throw PyError(e);
  }
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
    caller_.device().meet(options.device());
    return caller_.device().with([&](Device& d) { return d.empty({size}, options); });
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  if (x.layout() == at::kSparse) return allreduce_sparse(tensors, options);
  return submit(OpType::ALLREDUCE, "pycoll:all_reduce", options,
                [&] { return all_reduce_job(x, x, reduction_of(options.reduceOp), std::nullopt); });
}

Backend::Work Backend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& x = only(tensors, "all_reduce");
  check_sparse(x, options.reduceOp == c10d::ReduceOp::SUM);
  ++calls_;
  try {
    return caller_.start(OpType::_ALLREDUCE_SPARSE, "pycoll:sparse_all_reduce", tensors, sparse_all_reduce(seat(), x),
                         options.asyncOp);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return submit(OpType::ALLREDUCE_COALESCED, "pycoll:all_reduce", options, [&] {
    return in_turn(tensors.size(), [&](size_t i) {
      return all_reduce_job(tensors[i], tensors[i], reduction_of(options.reduceOp), std::nullopt);
    });
  });
}

Backend::Work Backend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor& x = only(tensors, "reduce");
  return submit(OpType::REDUCE, "pycoll:reduce", options, [&] {
    return reduce_job(seat(), x, x, reduction_of(options.reduceOp), static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& x = only(tensors, "broadcast");
  return submit(OpType::BROADCAST, "pycoll:broadcast", options,
                [&] { return broadcast_job(seat(), x, static_cast<int>(options.rootRank)); });
}

Backend::Work Backend::allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  const at::Tensor& x = only(inputs, "all_gather");
  const Tensors& blocks = only(outputs, "all_gather");
  return submit(OpType::ALLGATHER, "pycoll:all_gather", options, [&] { return all_gather_job(seat(), x, blocks); });
}

Backend::Work Backend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  return submit(OpType::_ALLGATHER_BASE, "pycoll:all_gather", options,
                [&] { return all_gather_job(seat(), input, Blocks(output)); });
}

Backend::Work Backend::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                           const c10d::AllgatherOptions& options) {
  return submit(OpType::COALESCED, "pycoll:all_gather", options, [&] {
    return in_turn(inputs.size(), [&](size_t i) {
      Tensors of_ranks;
      for (const Tensors& of_rank : outputs) {
        check_lengths(of_rank, inputs, "all_gather_coalesced");
        of_ranks.push_back(of_rank[i]);
      }
      return all_gather_job(seat(), inputs[i], of_ranks);
    });
  });
}

Backend::Work Backend::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return submit(OpType::COALESCED, "pycoll:all_gather", options, [&] {
    check_lengths(outputs, inputs, "all_gather_into_tensor_coalesced");
    return in_turn(inputs.size(), [&](size_t i) { return all_gather_job(seat(), inputs[i], Blocks(outputs[i])); });
  });
}

Backend::Work Backend::gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  const at::Tensor& x = only(inputs, "gather");
  return submit(OpType::GATHER, "pycoll:gather", options, [&] {
    std::optional<Blocks> blocks;
    if (!outputs.empty()) blocks.emplace(seat(), only(outputs, "gather"), x, "gather");
    return gather_job(seat(), x, blocks, static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                      const c10d::ReduceScatterOptions& options) {
  const at::Tensor& output = only(outputs, "reduce_scatter");
  const Tensors& blocks = only(inputs, "reduce_scatter");
  return submit(OpType::REDUCE_SCATTER, "pycoll:reduce_scatter", options,
                [&] { return reduce_scatter_job(seat(), blocks, output, reduction_of(options.reduceOp)); });
}

Backend::Work Backend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                            const c10d::ReduceScatterOptions& options) {
  return submit(OpType::_REDUCE_SCATTER_BASE, "pycoll:reduce_scatter", options,
                [&] { return reduce_scatter_job(seat(), Blocks(input), output, reduction_of(options.reduceOp)); });
}

Backend::Work Backend::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                       const c10d::ReduceScatterOptions& options) {
  return submit(OpType::COALESCED, "pycoll:reduce_scatter", options, [&] {
    check_lengths(outputs, inputs, "reduce_scatter_tensor_coalesced");
    return in_turn(inputs.size(), [&](size_t i) {
      return reduce_scatter_job(seat(), Blocks(inputs[i]), outputs[i], reduction_of(options.reduceOp));
    });
  });
}

Backend::Work Backend::scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) {
  const at::Tensor& output = only(outputs, "scatter");
  return submit(OpType::SCATTER, "pycoll:scatter", options, [&] {
    std::optional<Blocks> blocks;
    if (!inputs.empty()) blocks.emplace(seat(), only(inputs, "scatter"), output, "scatter");
    return scatter_job(seat(), blocks, output, static_cast<int>(options.rootRank));
  });
}

Backend::Work Backend::alltoall_base(at::Tensor& output, at::Tensor& input, Splits& output_splits, Splits& input_splits,
                                     const c10d::AllToAllOptions& options) {
  return submit(OpType::ALLTOALL_BASE, "pycoll:all_to_all", options,
                [&] { return all_to_all_job(seat(), input, output, input_splits, output_splits); });
}

Backend::Work Backend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  return submit(OpType::ALLTOALL, "pycoll:all_to_all", options,
                [&] { return all_to_all_job(seat(), inputs, outputs); });
}

Backend::Work Backend::barrier(const c10d::BarrierOptions& options) {
  return submit(OpType::BARRIER, "pycoll:barrier", options, [] { return barrier_job(); });
}

Backend::Work Backend::mail(Mailing::Direction direction, const Tensors& tensors, int peer, int tag) {
  try {
    const bool sends = direction == Mailing::Direction::kSend;
    return caller_.mail(direction, only(tensors, sends ? "send" : "recv"), peer, tag, /*async=*/true);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

Backend::Work Backend::send(Tensors& tensors, int peer, int tag) {
  return mail(Mailing::Direction::kSend, tensors, peer, tag);
}

Backend::Work Backend::recv(Tensors& tensors, int peer, int tag) {
  return mail(Mailing::Direction::kReceive, tensors, peer, tag);
}

Backend::Work Backend::recvAnysource(Tensors& tensors, int tag) {
  return mail(Mailing::Direction::kReceive, tensors, cpu::kAnySource, tag);
}

void Backend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  try {
    const bool given = options.timeout != c10d::kUnsetTimeout;
    monitored_barrier(caller_.comm(), given ? options.timeout : caller_.comm().timeout(), wait_all_ranks,
                      monitored_barriers_++);
  } catch (const Error& e) {
    throw PyError(e);
  }
}

void bind_backend(py::module_& m) {
  m.def("close_backends", &Backend::close_all, "Drains and closes every group.",
        py::call_guard<py::gil_scoped_release>());
  py::class_<BackendOptions, c10::intrusive_ptr<BackendOptions>, c10d::Backend::Options>(m, "BackendOptions")
      .def("__deepcopy__", [](const BackendOptions& options, const py::dict& /*memo*/) {
        return c10::make_intrusive<BackendOptions>(options);
      });
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend>(m, "Backend",
                                                                  "The c10d backend; see pycoll/backend.py.")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, const std::string&, const cpu::Config&,
                    const cpu::Config&, double, GlobalRanks>(),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("name"), py::arg("config"),
           py::arg("cuda_config"), py::arg("timeout"), py::arg("global_ranks"),
           py::call_guard<py::gil_scoped_release>())
      .def("trace",
           [](const Backend& b) {
             std::string text;
             {
               const py::gil_scoped_release no_gil;
               text = b.trace();
             }
             return py::bytes(text);
           })
      // torch calls these by name, where it finds them, on what is not one of its own backends.
      .def_property_readonly("options", &Backend::getBackendOptions)
      .def("_set_default_timeout", &Backend::setTimeout)
      .def("perform_nocolor_split", [](Backend&, const at::Device&) {}, "What ranks do that a split leaves out.");
}

}  // namespace pycoll::bindings
