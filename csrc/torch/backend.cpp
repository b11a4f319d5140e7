// The group: how it is made, split, merged and closed. Its calls are in torch/backend_calls.cpp.
#include "torch/backend.h"

#include <torch/extension.h>

#include <algorithm>
#include <mutex>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

#include "torch/errors.h"
#include "torch/gil.h"
#include "torch/modules.h"

namespace pycoll::bindings {

namespace {

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
                                             const c10d::Backend::Options& options,
                                             std::vector<uint64_t> global_ranks) {
  cpu::Config config, cuda_config;
  {
    const py::gil_scoped_acquire gil;
    const py::tuple both = py::module_::import("pycoll.backend").attr("configs")(world);
    config = both[0].cast<cpu::Config>();
    cuda_config = both[1].cast<cpu::Config>();
  }
  const GilReleased no_gil;
  try {
    return c10::make_intrusive<Backend>(store, rank, world,
                                        cpu::Names{"group " + options.group_name, std::move(global_ranks)}, config,
                                        cuda_config, std::chrono::duration<double>(options.timeout).count());
  } catch (const Error& e) {
    throw PyError(e);
  }
}

}  // namespace

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world, const cpu::Names& names,
                 const cpu::Config& config, const cpu::Config& cuda_config, double timeout_seconds)
    : c10d::Backend(rank, world), caller_(store, "group", names, rank, world, config, cuda_config, timeout_seconds) {
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
  options->global_ranks_in_group = global_ranks();
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
  std::vector<uint64_t> of_part;
  for (const int r : ranks) of_part.push_back(global_ranks().empty() ? r : global_ranks().at(r));
  auto group = make_group(store, static_cast<int>(me - ranks.begin()), static_cast<int>(ranks.size()), *options,
                          std::move(of_part));
  split_on_ = store;
  split_off_ = group;
  return group;
}

c10::intrusive_ptr<c10d::Backend> Backend::merge(const c10::intrusive_ptr<c10d::Store>& store,
                                                 const c10::intrusive_ptr<Options>& options, const int& rank,
                                                 const int& size) {
  return make_group(store, rank, size, *options, {});
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

void bind_backend(py::module_& m) {
  m.def("close_backends", &Backend::close_all, "Drains and closes every group.",
        py::call_guard<py::gil_scoped_release>());
  py::class_<BackendOptions, c10::intrusive_ptr<BackendOptions>, c10d::Backend::Options>(m, "BackendOptions")
      .def("__deepcopy__", [](const BackendOptions& options, const py::dict& /*memo*/) {
        return c10::make_intrusive<BackendOptions>(options);
      });
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend>(m, "Backend",
                                                                  "The c10d backend; see pycoll/backend.py.")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, const cpu::Names&, const cpu::Config&,
                    const cpu::Config&, double>(),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("names"), py::arg("config"),
           py::arg("cuda_config"), py::arg("timeout"), py::call_guard<py::gil_scoped_release>())
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
