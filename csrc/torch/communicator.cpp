// pycoll._C.Communicator: the collectives on torch tensors. pycoll/communicator.py is its public face and documents it.
#include "cpu/communicator.h"

#include <torch/extension.h>

#include "torch/bucket.h"
#include "torch/caller.h"
#include "torch/errors.h"
#include "torch/modules.h"

namespace pycoll::bindings {

namespace {

class PyCommunicator {
 public:
  PyCommunicator(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const std::string& key,
                 const cpu::Names& names, const cpu::Config& config, const cpu::Config& cuda_config,
                 double timeout_seconds)
      : caller_(store, key, names, rank, world, config, cuda_config, timeout_seconds) {}

  using Handle = c10::intrusive_ptr<c10d::Work>;  // of what is asynchronous; else null

  Handle all_reduce(const at::Tensor& x, const std::optional<at::Tensor>& out, const std::string& op,
                    const std::string& algorithm, bool async) {
    Job job = all_reduce_job(x, out ? *out : x, {parse_op(op)}, parse_algorithm(algorithm));
    return submit(c10d::OpType::ALLREDUCE, "pycoll:all_reduce", std::move(job), async, x);
  }

  Handle reduce(const at::Tensor& x, const std::optional<at::Tensor>& out, const std::string& op, int root,
                bool async) {
    Job job = reduce_job(seat(), x, out ? *out : x, {parse_op(op)}, root);
    return submit(c10d::OpType::REDUCE, "pycoll:reduce", std::move(job), async, x);
  }

  Handle broadcast(const at::Tensor& x, int root, bool async) {
    return submit(c10d::OpType::BROADCAST, "pycoll:broadcast", broadcast_job(seat(), x, root), async, x);
  }

  Handle all_gather(const at::Tensor& x, const at::Tensor& out, bool async) {
    Job job = all_gather_job(seat(), x, Blocks(out));
    return submit(c10d::OpType::ALLGATHER, "pycoll:all_gather", std::move(job), async, x);
  }

  Handle gather(const at::Tensor& x, const std::optional<at::Tensor>& out, int root, bool async) {
    Job job = gather_job(seat(), x, blocks(out), root);
    return submit(c10d::OpType::GATHER, "pycoll:gather", std::move(job), async, x);
  }

  Handle reduce_scatter(const at::Tensor& x, const at::Tensor& out, const std::string& op, bool async) {
    Job job = reduce_scatter_job(seat(), Blocks(x), out, {parse_op(op)});
    return submit(c10d::OpType::REDUCE_SCATTER, "pycoll:reduce_scatter", std::move(job), async, out);
  }

  Handle scatter(const std::optional<at::Tensor>& x, const at::Tensor& out, int root, bool async) {
    Job job = scatter_job(seat(), blocks(x), out, root);
    return submit(c10d::OpType::SCATTER, "pycoll:scatter", std::move(job), async, out);
  }

  Handle all_to_all(const at::Tensor& x, const at::Tensor& out, const Splits& send, const Splits& recv, bool async) {
    Job job = all_to_all_job(seat(), x, out, send, recv);
    return submit(c10d::OpType::ALLTOALL, "pycoll:all_to_all", std::move(job), async, at::Tensor());
  }

  // -> the rank that it came from, or the handle.
  py::object send(const at::Tensor& x, int peer, int tag, bool async) {
    return mail(Mailing::Direction::kSend, x, peer, tag, async);
  }
  py::object recv(const at::Tensor& x, int peer, int tag, bool async) {
    if (x.requires_grad() && at::GradMode::is_enabled()) {
      throw_usage("recv would change a tensor that requires grad: call it under torch.no_grad(), or on x.detach()");
    }
    return mail(Mailing::Direction::kReceive, x, peer, tag, async);
  }

  Handle barrier(bool async) {
    return submit(c10d::OpType::BARRIER, "pycoll:barrier", barrier_job(), async, at::Tensor());
  }

  // A function of csrc/torch/bucket.h as a method.
  template <class Result, class... Args>
  static auto method(Result (*f)(Caller&, Args...)) {
    return [f](PyCommunicator& self, Args... args) -> Result { return f(self.caller_, args...); };
  }

  at::Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype, const at::Device& device) {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;  // pycoll/communicator.py has checked them
    const auto options = at::TensorOptions().dtype(dtype);
    if (!device.is_cpu()) {
      const py::gil_scoped_release no_gil;
      caller_.device().meet(device);
      return caller_.device().with([&](Device& d) { return d.empty(shape, options.device(device)); });
    }
    std::shared_ptr<void> block;
    {
      const py::gil_scoped_release no_gil;
      block = caller_.comm().allocate(static_cast<size_t>(count) * options.dtype().itemsize());
    }
    return at::from_blob(block.get(), shape, [block](void*) {}, options);
  }

  py::object mem_allocator(const at::Device& device) {
    std::function<at::Tensor(int64_t)> allocate;
    {
      const py::gil_scoped_release no_gil;
      allocate = caller_.device().allocator(device);
    }
#ifdef PYCOLL_WITH_CUDA
    if (allocate) return make_mem_allocator(allocate);
#endif
    return py::none();
  }

  void close() {
    const py::gil_scoped_release no_gil;
    caller_.comm().close();
  }
  std::string rank_name(int rank) const { return caller_.comm().names().rank(rank); }
  void abort(const std::string& reason) {
    const py::gil_scoped_release no_gil;  // a failure may be told on standard error, and to a file
    caller_.comm().abort("pycoll: " + caller_.name() + ": " + reason);
  }
  py::bytes trace() const {
    std::string text;
    {
      const py::gil_scoped_release no_gil;
      text = caller_.comm().trace();
    }
    return text;
  }
  bool closed() const { return caller_.comm().closed(); }
  size_t footprint() const { return caller_.comm().footprint(); }
  size_t device_footprint() const {
    const py::gil_scoped_release no_gil;  // whoever holds the heap's lock may wait for the GPU
    size_t bytes = 0;
    caller_.device().if_any([&](const Device& d) { bytes = d.footprint(); });
    return bytes;
  }
  std::string device() const {
    const py::gil_scoped_release no_gil;
    std::string what;
    caller_.device().if_any([&](const Device& d) { what = d.describe(); });
    return what;
  }
  int channels() const { return caller_.comm().geometry().channels; }

 private:
  Seat seat() const { return caller_.seat(); }
  static std::optional<Blocks> blocks(const std::optional<at::Tensor>& whole) {
    return whole ? std::make_optional<Blocks>(*whole) : std::nullopt;
  }

  py::object mail(Mailing::Direction direction, const at::Tensor& x, int peer, int tag, bool async) {
    c10::intrusive_ptr<Mailing> mailing;
    {
      const py::gil_scoped_release no_gil;
      mailing = caller_.mail(direction, x, peer, tag, async);
    }
    if (direction == Mailing::Direction::kReceive && !x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
    if (!async) return py::int_(mailing->sourceRank());
    return py::cast(Handle(std::move(mailing)));
  }

  // `like`: a tensor whose shape and element type all ranks compare.
  Handle submit(c10d::OpType type, const char* title, Job job, bool async, const at::Tensor& like) {
    c10::SmallVector<at::Tensor, 2> written;
    for (const Dense& d : job.writes) {
      const at::Tensor& t = d.tensor();
      if (t.requires_grad() && at::GradMode::is_enabled()) {
        throw_usage(std::string(name(job.calls[0].collective)) +
                    " would change a tensor that requires grad behind autograd's back: call it under torch.no_grad(), "
                    "or on x.detach()");
      }
      if (!t.is_inference()) written.push_back(t);
    }
    if (like.defined()) job.calls[0].shape = fingerprint(like.scalar_type(), like.sizes());
    Handle handle;
    {
      const py::gil_scoped_release no_gil;
      if (async) {
        handle = caller_.start(type, title, std::move(job), async);
      } else {
        caller_.run(title, job);
      }
    }
    for (const at::Tensor& t : written) t.unsafeGetTensorImpl()->bump_version();  // autograd must know of the write
    return handle;
  }

  Caller caller_;
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
  py::class_<cpu::Names>(m, "Names", "What a communicator and its ranks are called in texts.")
      .def(py::init<std::string, std::vector<uint64_t>>(), py::arg("group"), py::arg("global_ranks"));
  m.def("sample", &sample, py::call_guard<py::gil_scoped_release>());
  m.def("pack", &pack, py::arg("params"), py::arg("grads"), py::arg("firsts"), py::arg("wire"), py::arg("memory"),
        py::arg("residual"), py::arg("factor") = py::none(), py::arg("found_inf") = py::none(),
        py::arg("streams") = false, py::call_guard<py::gil_scoped_release>());
  m.def("average_int8", &average_int8, py::arg("wires"), py::arg("to"), py::call_guard<py::gil_scoped_release>());
  py::class_<PyCommunicator>(m, "Communicator", "Collectives on torch tensors; see pycoll.Communicator.")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, const std::string&, const cpu::Names&,
                    const cpu::Config&, const cpu::Config&, double>(),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("key"), py::arg("names"),
           py::arg("config"), py::arg("cuda_config"), py::arg("timeout"), py::call_guard<py::gil_scoped_release>())
      .def("all_reduce", &PyCommunicator::all_reduce)
      .def("reduce", &PyCommunicator::reduce)
      .def("broadcast", &PyCommunicator::broadcast)
      .def("all_gather", &PyCommunicator::all_gather)
      .def("gather", &PyCommunicator::gather)
      .def("reduce_scatter", &PyCommunicator::reduce_scatter)
      .def("scatter", &PyCommunicator::scatter)
      .def("all_to_all", &PyCommunicator::all_to_all)
      .def("barrier", &PyCommunicator::barrier)
      .def("send", &PyCommunicator::send)
      .def("recv", &PyCommunicator::recv)
      .def("reduce_bucket", PyCommunicator::method(&reduce_bucket), py::call_guard<py::gil_scoped_release>())
      .def("update_bucket", PyCommunicator::method(&update_bucket), py::call_guard<py::gil_scoped_release>())
      .def("empty", &PyCommunicator::empty)
      .def("mem_allocator", &PyCommunicator::mem_allocator)
      .def("close", &PyCommunicator::close)
      .def("rank_name", &PyCommunicator::rank_name)
      .def("abort", &PyCommunicator::abort)
      .def("trace", &PyCommunicator::trace)
      .def_property_readonly("closed", &PyCommunicator::closed)
      .def_property_readonly("channels", &PyCommunicator::channels)
      .def_property_readonly("footprint", &PyCommunicator::footprint)
      .def_property_readonly("device_footprint", &PyCommunicator::device_footprint)
      .def_property_readonly("device", &PyCommunicator::device);
}

}  // namespace pycoll::bindings
