// pycoll._C.Communicator: the collectives on torch tensors. pycoll/communicator.py is its public face and documents it.
#include "cpu/communicator.h"

#include <torch/extension.h>

#include "torch/device.h"
#include "torch/errors.h"
#include "torch/modules.h"
#include "torch/store.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

namespace {

class PyCommunicator {
 public:
  PyCommunicator(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const std::string& name,
                 const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds) {
    TorchStore keys(store, name);
    comm_ = std::make_unique<cpu::Communicator>(keys, rank, world, config, milliseconds(timeout_seconds));
    device_ = std::make_unique<DeviceSlot>(*comm_, cuda_config);
  }

  ~PyCommunicator() {
    const py::gil_scoped_release no_gil;  // closing waits for threads
    comm_.reset();
  }

  void all_reduce(const at::Tensor& x, const std::optional<at::Tensor>& out, const std::string& op,
                  const std::string& algorithm) {
    const at::Tensor& result = out ? *out : x;
    check_memory(x, "all_reduce");
    check_writable(result, "all_reduce");
    check_like(x, result, "all_reduce");
    cpu::Call call{.collective = Collective::kAllReduce, .dtype = reducible(x, "all_reduce"), .op = parse_op(op)};
    call.algorithm = parse_algorithm(algorithm);
    run(call, x, result, static_cast<size_t>(x.numel()), /*in_place=*/!out);
  }

  void broadcast(const at::Tensor& x, int root) {
    check_writable(x, "broadcast");
    if (root < 0 || root >= comm_->world()) {
      throw_usage("broadcast: root " + std::to_string(root) + " is not in a world of " +
                  std::to_string(comm_->world()));
    }
    const Elements e = elements_to_copy(x);
    run({.collective = Collective::kBroadcast, .dtype = e.dtype, .root = root}, x, x, e.count, /*in_place=*/true);
  }

  void all_gather(const at::Tensor& x, const at::Tensor& out) {
    check_memory(x, "all_gather");
    check_writable(out, "all_gather");
    check_block(x, out, "all_gather", "out");
    const Elements e = elements_to_copy(x);
    run({.collective = Collective::kAllGather, .dtype = e.dtype}, x, out, e.count, /*in_place=*/false);
  }

  void reduce_scatter(const at::Tensor& x, const at::Tensor& out, const std::string& op) {
    check_memory(x, "reduce_scatter");
    check_writable(out, "reduce_scatter");
    check_block(out, x, "reduce_scatter", "x");
    const DType dtype = reducible(x, "reduce_scatter");
    run({.collective = Collective::kReduceScatter, .dtype = dtype, .op = parse_op(op)}, x, out,
        static_cast<size_t>(x.numel()),
        /*in_place=*/false);
  }

  void barrier() {
    const py::gil_scoped_release no_gil;
    comm_->run({.collective = Collective::kBarrier});
  }

  at::Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype, const at::Device& device) {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;  // pycoll/communicator.py has checked them
    const auto options = at::TensorOptions().dtype(dtype);
    if (!device.is_cpu()) {
      const py::gil_scoped_release no_gil;
      device_->meet(device);
      return device_->with([&](Device& d) { return d.empty(shape, options.device(device)); });
    }
    std::shared_ptr<void> block;
    {
      const py::gil_scoped_release no_gil;
      block = comm_->allocate(static_cast<size_t>(count) * options.dtype().itemsize());
    }
    return at::from_blob(block.get(), shape, [block](void*) {}, options);
  }

  py::object mem_allocator(const at::Device& device) {
    std::function<at::Tensor(int64_t)> allocate;
    {
      const py::gil_scoped_release no_gil;
      allocate = device_->allocator(device);
    }
#ifdef PYCOLL_WITH_CUDA
    if (allocate) return make_mem_allocator(allocate);
#endif
    return py::none();
  }

  void close() {
    const py::gil_scoped_release no_gil;
    comm_->close();
  }
  void abort(const std::string& why) { comm_->abort(why); }
  bool closed() const { return comm_->closed(); }
  size_t footprint() const { return comm_->footprint(); }
  size_t device_footprint() const {
    const py::gil_scoped_release no_gil;  // whoever holds the heap's lock may wait for the GPU
    size_t bytes = 0;
    device_->if_any([&](const Device& d) { bytes = d.footprint(); });
    return bytes;
  }
  std::string device() const {
    const py::gil_scoped_release no_gil;
    std::string what;
    device_->if_any([&](const Device& d) { what = d.describe(); });
    return what;
  }
  int channels() const { return comm_->geometry().channels; }

 private:
  static std::chrono::milliseconds milliseconds(double seconds) {
    if (!(seconds > 0)) throw_usage("timeout must be positive, in seconds");
    return std::chrono::milliseconds(static_cast<int64_t>(std::min(seconds, 1e9) * 1000));
  }

  static void check_like(const at::Tensor& x, const at::Tensor& out, const char* collective) {
    if (out.scalar_type() != x.scalar_type() || out.sizes() != x.sizes()) {
      throw_usage(c10::str(collective, ": `out` must be ", x.scalar_type(), " of shape ", x.sizes(), ", not ",
                           out.scalar_type(), " of shape ", out.sizes()));
    }
  }

  // `whole` holds one `block` a rank.
  void check_block(const at::Tensor& block, const at::Tensor& whole, const char* collective,
                   const char* whole_name) const {
    if (whole.scalar_type() != block.scalar_type() || whole.numel() != block.numel() * comm_->world()) {
      throw_usage(c10::str(collective, ": `", whole_name, "` must hold ", comm_->world(), " blocks of ", block.numel(),
                           " ", block.scalar_type(), " elements, not ", whole.numel(), " of ", whole.scalar_type()));
    }
  }

  void run(cpu::Call call, const at::Tensor& in, const at::Tensor& out, size_t count, bool in_place) {
    if (in.device() != out.device()) {
      throw_usage(c10::str(name(call.collective), ": the tensors lie on ", in.device(), " and ", out.device()));
    }
    if (out.requires_grad() && at::GradMode::is_enabled()) {
      throw_usage(std::string(name(call.collective)) +
                  " would change a tensor that requires grad behind autograd's back: call it under torch.no_grad(), or "
                  "on x.detach()");
    }
    const Dense result(out), given(in);
    const Dense& from = in_place ? result : given;
    check_overlap(from.memory(), result.memory(), comm_->rank(), name(call.collective));
    call.in = from.memory().const_data_ptr();
    call.out = result.memory().mutable_data_ptr();
    call.count = count;
    call.shape = fingerprint(in.scalar_type(), in.sizes());
    if (!out.device().is_cpu()) {
      run_on_device(call, from, result);
    } else {
      const py::gil_scoped_release no_gil;
      comm_->run(call, [&] { from.load(); }, [&] { result.store(); });
    }
    if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();  // autograd must know of the write
  }

  void run_on_device(cpu::Call& call, const Dense& from, const Dense& result) {
    const py::gil_scoped_release no_gil;
    DeviceTurn turn(*device_, result.tensor().device(), /*async=*/false, call);
    for (const Dense* d : {&from, &result}) {  // also if it fails, with moves still on the stream
      turn.uses(d->tensor());
      turn.uses(d->memory());
    }
    const auto begin = [&] { turn.begin([&] { from.load(); }); };
    const auto end = [&] { turn.end([&] { result.store(); }); };
    if (turn.on_host()) {
      comm_->run(call, begin, end);
    } else {
      begin();
      turn.launch(call);
      end();
    }
    turn.let_current_wait();
  }

  std::unique_ptr<cpu::Communicator> comm_;
  std::unique_ptr<DeviceSlot> device_;
};

}  // namespace

void bind_communicator(py::module_& m) {
  py::class_<cpu::Config>(m, "Config", "Wishes of one rank; see pycoll.Config.")
      .def(py::init<>())
      .def_readwrite("channels", &cpu::Config::channels)
      .def_readwrite("link_slots", &cpu::Config::link_slots)
      .def_readwrite("slot_bytes", &cpu::Config::slot_bytes)
      .def_readwrite("link_bytes", &cpu::Config::link_bytes)
      .def_readwrite("heap_bytes", &cpu::Config::heap_bytes)
      .def_readwrite("one_shot_max_bytes", &cpu::Config::one_shot_max_bytes)
      .def_readwrite("channel_min_bytes", &cpu::Config::channel_min_bytes)
      .def_readwrite("word_bytes", &cpu::Config::word_bytes)
      .def_readwrite("one_shot_ll_max_bytes", &cpu::Config::one_shot_ll_max_bytes)
      .def_readwrite("two_shot_ll_max_bytes", &cpu::Config::two_shot_ll_max_bytes);
  py::class_<PyCommunicator>(m, "Communicator", "Collectives on torch tensors; see pycoll.Communicator.")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, const std::string&, const cpu::Config&,
                    const cpu::Config&, double>(),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("name"), py::arg("config"),
           py::arg("cuda_config"), py::arg("timeout"), py::call_guard<py::gil_scoped_release>())
      .def("all_reduce", &PyCommunicator::all_reduce)
      .def("broadcast", &PyCommunicator::broadcast)
      .def("all_gather", &PyCommunicator::all_gather)
      .def("reduce_scatter", &PyCommunicator::reduce_scatter)
      .def("barrier", &PyCommunicator::barrier)
      .def("empty", &PyCommunicator::empty)
      .def("mem_allocator", &PyCommunicator::mem_allocator)
      .def("close", &PyCommunicator::close)
      .def("abort", &PyCommunicator::abort)
      .def_property_readonly("closed", &PyCommunicator::closed)
      .def_property_readonly("channels", &PyCommunicator::channels)
      .def_property_readonly("footprint", &PyCommunicator::footprint)
      .def_property_readonly("device_footprint", &PyCommunicator::device_footprint)
      .def_property_readonly("device", &PyCommunicator::device);
}

}  // namespace pycoll::bindings
