#include "torch/cuda/local_group.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <torch/extension.h>

#include <numeric>

#include "torch/modules.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

LocalGroup::LocalGroup(int world, at::Device device, const cpu::Config& config, std::chrono::milliseconds timeout)
    : world_(world), device_(device), config_(config), timeout_(timeout) {
  if (world < 1 || world > cuda_device::kMaxRanks) {
    throw_usage("a local group has 1 to " + std::to_string(cuda_device::kMaxRanks) + " ranks, not " +
                std::to_string(world));
  }
  const c10::cuda::CUDAGuard on(device_);
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
  int blocks = 0;
  check_cuda(cuda_device::resident_blocks(&blocks), "asking for the number of resident blocks");
  channels_ = std::min(config.channels > 0 ? config.channels : kMostChannels, blocks / world);
  if (channels_ < 1) {
    throw_usage("this GPU holds " + std::to_string(blocks) + " blocks at once, too few for " + std::to_string(world) +
                " ranks");
  }
  const Geometry geometry = device_geometry(config, world, channels_);
  const size_t each = round_up(geometry.scratch_bytes(), 4096);
  segments_ = at::empty({static_cast<int64_t>(each) * world}, at::TensorOptions().dtype(at::kByte).device(device_));
  check_cuda(cudaMemsetAsync(segments_.mutable_data_ptr(), 0, segments_.nbytes(), at::cuda::getCurrentCUDAStream()),
             "preparing the ranks");
  std::vector<std::byte*> bases;
  for (int r = 0; r < world; ++r) bases.push_back(static_cast<std::byte*>(segments_.mutable_data_ptr()) + r * each);
  std::vector<int> all(world);
  std::iota(all.begin(), all.end(), 0);
  launcher_ = std::make_unique<Launcher>(device_, geometry, bases, all, /*multicast=*/nullptr);
}

void LocalGroup::launch(const std::vector<const cpu::Call*>& calls) {
  const cpu::Call& call = *calls[0];
  if (const std::exception_ptr failed = failure()) std::rethrow_exception(failed);
  const Choice choice = choose(config_, call, world_, channels_, /*multicast=*/false);
  cuda_device::DeviceCall d{};
  d.channels = choice.channels;
  d.record.count = call.count;
  d.record.root = call.root;
  d.record.collective = call.collective;
  d.record.dtype = call.dtype;
  d.record.op = call.op;
  d.record.algorithm = choice.algorithm;
  d.timeout_ns = static_cast<uint64_t>(timeout_.count()) * 1000000;
  cuda_device::DeviceCounts counts{};
  for (int r = 0; r < world_; ++r) {
    d.in[r] = calls[r]->in;
    d.out[r] = calls[r]->out;
    if (!call.send_counts) continue;
    std::copy_n(calls[r]->send_counts, world_, counts.send[r]);
    std::copy_n(calls[r]->recv_counts, world_, counts.recv[r]);
  }
  launcher_->launch(d, call.send_counts ? &counts : nullptr);
}

namespace {

// pycoll._C.LocalGroup: the group on tensors, called from one thread. pycoll/local_group.py documents it.
class PyLocalGroup {
 public:
  using Tensors = std::vector<at::Tensor>;

  PyLocalGroup(int world, int device, const cpu::Config& config, double timeout_seconds)
      : group_(world, {at::kCUDA, static_cast<c10::DeviceIndex>(device)}, config,
               std::chrono::milliseconds(static_cast<int64_t>(std::min(timeout_seconds, 1e9) * 1000))) {}

  void all_reduce(const Tensors& tensors, const std::string& op, const std::string& algorithm) {
    check(tensors, "all_reduce");
    const Elements e = elements_to_reduce(tensors[0], "all_reduce");
    cpu::Call call{.collective = Collective::kAllReduce, .dtype = e.dtype, .count = e.count};
    call.op = op_for(tensors[0], parse_op(op), "all_reduce");
    call.algorithm = parse_algorithm(algorithm);
    run(call, tensors, tensors);
  }

  void broadcast(const Tensors& tensors, int root) {
    check(tensors, "broadcast");
    if (root < 0 || root >= group_.world()) {
      throw_usage("broadcast: root " + std::to_string(root) + " is not in a group of " +
                  std::to_string(group_.world()));
    }
    const Elements e = elements_to_copy(tensors[0]);
    run({.collective = Collective::kBroadcast, .dtype = e.dtype, .root = root, .count = e.count}, tensors, tensors);
  }

  void all_gather(const Tensors& tensors, const Tensors& out) {
    check(tensors, "all_gather");
    check(out, "all_gather");
    check_blocks(tensors[0], out[0], "all_gather");
    const Elements e = elements_to_copy(tensors[0]);
    run({.collective = Collective::kAllGather, .dtype = e.dtype, .count = e.count}, tensors, out);
  }

  void reduce_scatter(const Tensors& tensors, const Tensors& out, const std::string& op) {
    check(tensors, "reduce_scatter");
    check(out, "reduce_scatter");
    check_blocks(out[0], tensors[0], "reduce_scatter");
    const Elements e = elements_to_reduce(tensors[0], "reduce_scatter");
    cpu::Call call{.collective = Collective::kReduceScatter, .dtype = e.dtype, .count = e.count};
    call.op = op_for(tensors[0], parse_op(op), "reduce_scatter");
    run(call, tensors, out);
  }

  void abort() { group_.abort(); }
  int channels() const { return group_.channels(); }
  size_t footprint() const { return group_.footprint(); }

 private:
  void run(const cpu::Call& call, const Tensors& tensors, const Tensors& results) {
    const c10::cuda::CUDAGuard on(group_.device());
    const bool in_place = &tensors == &results;
    std::vector<Dense> from, to;
    std::vector<cpu::Call> calls(group_.world(), call);
    std::vector<const cpu::Call*> of_ranks;
    for (int r = 0; r < group_.world(); ++r) {
      to.emplace_back(results[r]);
      from.push_back(in_place ? to.back() : Dense(tensors[r]));
      check_overlap(from.back().memory(), to.back().memory(), r, name(call.collective));
      calls[r].in = from.back().memory().const_data_ptr();
      calls[r].out = to.back().memory().mutable_data_ptr();
      of_ranks.push_back(&calls[r]);
    }
    check_apart(to, name(call.collective));
    for (const Dense& d : from) d.load();
    group_.launch(of_ranks);
    for (const Dense& d : to) {
      d.store();
      if (!d.tensor().is_inference()) d.tensor().unsafeGetTensorImpl()->bump_version();
    }
  }

  void check(const Tensors& tensors, const char* collective) const {
    if (static_cast<int>(tensors.size()) != group_.world()) {
      throw_usage(std::string(collective) + " needs a tensor for each of the " + std::to_string(group_.world()) +
                  " ranks, not " + std::to_string(tensors.size()));
    }
    for (const at::Tensor& t : tensors) {
      check_writable(t, collective);
      if (t.device() != group_.device()) {
        throw_unsupported(std::string(collective) + " got a tensor on " + t.device().str() + ": this group's are on " +
                          group_.device().str());
      }
      if (t.scalar_type() != tensors[0].scalar_type() || t.sizes() != tensors[0].sizes()) {
        throw Error(ErrorKind::kMismatch,
                    std::string("pycoll: ") + collective + ": the ranks' tensors differ in shape or dtype");
      }
    }
  }

  void check_blocks(const at::Tensor& block, const at::Tensor& whole, const char* collective) const {
    if (whole.numel() != block.numel() * group_.world() || whole.scalar_type() != block.scalar_type()) {
      throw_usage(std::string(collective) + ": the larger tensors must hold " + std::to_string(group_.world()) +
                  " of the smaller ones, of one dtype");
    }
  }

  // What ranks write must not lie where others read or write.
  static void check_apart(const std::vector<Dense>& to, const char* collective) {
    for (size_t i = 0; i < to.size(); ++i) {
      for (size_t j = i + 1; j < to.size(); ++j) {
        const auto* a = static_cast<const char*>(to[i].memory().const_data_ptr());
        const auto* b = static_cast<const char*>(to[j].memory().const_data_ptr());
        if (a < b + to[j].memory().nbytes() && b < a + to[i].memory().nbytes()) {
          throw_usage(std::string(collective) + ": the tensors of ranks " + std::to_string(i) + " and " +
                      std::to_string(j) + " overlap");
        }
      }
    }
  }

  LocalGroup group_;
};

}  // namespace

void bind_local_group(py::module_& m) {
  py::class_<PyLocalGroup>(m, "LocalGroup", "Ranks that share a GPU and a process; see pycoll.LocalGroup.")
      .def(py::init<int, int, const cpu::Config&, double>(), py::arg("world_size"), py::arg("device"),
           py::arg("config"), py::arg("timeout"))
      .def("all_reduce", &PyLocalGroup::all_reduce, py::call_guard<py::gil_scoped_release>())
      .def("broadcast", &PyLocalGroup::broadcast, py::call_guard<py::gil_scoped_release>())
      .def("all_gather", &PyLocalGroup::all_gather, py::call_guard<py::gil_scoped_release>())
      .def("reduce_scatter", &PyLocalGroup::reduce_scatter, py::call_guard<py::gil_scoped_release>())
      .def("abort", &PyLocalGroup::abort)
      .def_property_readonly("channels", &PyLocalGroup::channels)
      .def_property_readonly("footprint", &PyLocalGroup::footprint);
}

}  // namespace pycoll::bindings
