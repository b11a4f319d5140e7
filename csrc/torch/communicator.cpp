// pycoll._C.Communicator: the collectives on torch tensors. pycoll/communicator.py is its public face and documents it.
#include "cpu/communicator.h"

#include <torch/extension.h>

#include "torch/errors.h"
#include "torch/modules.h"
#include "torch/store.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

namespace {

class PyCommunicator {
 public:
  PyCommunicator(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const std::string& name,
                 const cpu::Config& config, double timeout_seconds)
      : rank_(rank), world_(world) {
    TorchStore keys(store, name);
    comm_ = std::make_shared<cpu::Communicator>(keys, rank, world, config, milliseconds(timeout_seconds));
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
    check_like(x, result, "all_reduce", x.sizes());
    cpu::Call call{.collective = Collective::kAllReduce, .dtype = reducible(x, "all_reduce"), .op = parse_op(op)};
    call.algorithm = parse_algorithm(algorithm);
    run(call, x, result, static_cast<size_t>(x.numel()), /*in_place=*/!out);
  }

  void broadcast(const at::Tensor& x, int root) {
    check_writable(x, "broadcast");
    if (root < 0 || root >= world_) {
      throw_usage("broadcast: root " + std::to_string(root) + " is not in a world of " + std::to_string(world_));
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
    const Shared comm = use();
    const py::gil_scoped_release no_gil;
    comm->run({.collective = Collective::kBarrier});
  }

  at::Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype) {
    int64_t count = 1;
    for (const int64_t n : shape) {
      if (n < 0) throw_usage("empty: a shape has no negative sizes");
      count *= n;
    }
    const auto options = at::TensorOptions().dtype(dtype);
    const Shared comm = use();
    std::shared_ptr<void> block;
    {
      const py::gil_scoped_release no_gil;
      block = comm->allocate(static_cast<size_t>(count) * options.dtype().itemsize());
    }
    return at::from_blob(block.get(), shape, [block](void*) {}, options);
  }

  void close() {
    Shared comm = comm_;
    if (!comm) return;
    const bool mine = [&] {
      const py::gil_scoped_release no_gil;
      comm->close();
      return comm->closed();  // not from within a collective, by a signal handler
    }();
    if (mine) comm_.reset();
    const py::gil_scoped_release no_gil;
    comm.reset();
  }

  void abort(const std::string& why) {
    if (comm_) comm_->abort(why);
  }
  bool closed() const { return !comm_ || comm_->closed(); }
  size_t footprint() const { return comm_ ? comm_->footprint() : 0; }
  int channels() const { return use()->geometry().channels; }

 private:
  using Shared = std::shared_ptr<cpu::Communicator>;

  // Under the GIL; the copy keeps it while another thread closes.
  Shared use() const {
    if (!comm_) throw cpu::Error(cpu::ErrorKind::kError, "pycoll: the communicator is closed");
    return comm_;
  }

  static std::chrono::milliseconds milliseconds(double seconds) {
    if (!(seconds > 0)) throw_usage("timeout must be positive, in seconds");
    return std::chrono::milliseconds(static_cast<int64_t>(std::min(seconds, 1e9) * 1000));
  }

  static void check_like(const at::Tensor& x, const at::Tensor& out, const char* collective, at::IntArrayRef shape) {
    if (out.scalar_type() != x.scalar_type() || out.sizes() != shape) {
      throw_usage(c10::str(collective, ": `out` must be ", x.scalar_type(), " of shape ", shape, ", not ",
                           out.scalar_type(), " of shape ", out.sizes()));
    }
  }

  // `whole` holds one `block` a rank.
  void check_block(const at::Tensor& block, const at::Tensor& whole, const char* collective,
                   const char* whole_name) const {
    if (whole.scalar_type() != block.scalar_type() || whole.numel() != block.numel() * world_) {
      throw_usage(c10::str(collective, ": `", whole_name, "` must hold ", world_, " blocks of ", block.numel(),
                           " ", block.scalar_type(), " elements, not ", whole.numel(), " of ", whole.scalar_type()));
    }
  }

  void run(cpu::Call call, const at::Tensor& in, const at::Tensor& out, size_t count, bool in_place) {
    const Output result(out, /*keep_content=*/in_place);
    const at::Tensor dense = in_place ? result.dense() : in.contiguous();
    const bool same_size = dense.nbytes() == result.dense().nbytes();
    if (same_size) {
      check_overlap(dense, result.dense(), name(call.collective));
    } else {
      check_own_block(dense, result.dense(), name(call.collective));
    }
    call.in = dense.const_data_ptr();
    call.out = result.dense().mutable_data_ptr();
    call.count = count;
    const Shared comm = use();
    {
      const py::gil_scoped_release no_gil;
      comm->run(call);
      result.finish();
    }
    if (!out.is_inference()) out.unsafeGetTensorImpl()->bump_version();  // autograd must know of the write
  }

  // all_gather and reduce_scatter in place: the smaller tensor is this rank's block of the larger.
  void check_own_block(const at::Tensor& in, const at::Tensor& out, const char* collective) const {
    const at::Tensor& block = in.nbytes() < out.nbytes() ? in : out;
    const at::Tensor& whole = in.nbytes() < out.nbytes() ? out : in;
    const auto* b = static_cast<const char*>(block.const_data_ptr());
    const auto* w = static_cast<const char*>(whole.const_data_ptr());
    const bool disjoint = b + block.nbytes() <= w || w + whole.nbytes() <= b;
    if (!disjoint && b != w + rank_ * block.nbytes()) {
      throw_usage(std::string(collective) +
                  ": the tensors overlap, and the smaller is not this rank's block of the larger");
    }
  }

  const int rank_, world_;
  Shared comm_;  // none once closed: an object that is kept holds no memory
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
      .def_readwrite("channel_min_bytes", &cpu::Config::channel_min_bytes);
  py::class_<PyCommunicator>(m, "Communicator", "Collectives on torch tensors; see pycoll.Communicator.")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, const std::string&, const cpu::Config&, double>(),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("name"), py::arg("config"),
           py::arg("timeout"), py::call_guard<py::gil_scoped_release>())
      .def("all_reduce", &PyCommunicator::all_reduce)
      .def("broadcast", &PyCommunicator::broadcast)
      .def("all_gather", &PyCommunicator::all_gather)
      .def("reduce_scatter", &PyCommunicator::reduce_scatter)
      .def("barrier", &PyCommunicator::barrier)
      .def("empty", &PyCommunicator::empty)
      .def("close", &PyCommunicator::close)
      .def("abort", &PyCommunicator::abort)
      .def_property_readonly("closed", &PyCommunicator::closed)
      .def_property_readonly("channels", &PyCommunicator::channels)
      .def_property_readonly("footprint", &PyCommunicator::footprint);
}

}  // namespace pycoll::bindings
