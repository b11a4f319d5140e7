// pycoll._C.LocalGroup: ranks that share a GPU and this process. One thread calls for all of them, and one cooperative
// launch runs all of them. pycoll/local_group.py is its public face and documents it.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <torch/extension.h>

#include <algorithm>
#include <chrono>

#include "core/atomic.h"
#include "cpu/attach.h"
#include "cuda/launch.h"
#include "torch/errors.h"
#include "torch/modules.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

namespace {

using cuda_device::GroupCall;
using cuda_device::GroupRank;
using cuda_device::Status;

void check_cuda(int error, const char* what) {
  if (error == cudaSuccess) return;
  throw Error(ErrorKind::kError,
              std::string("pycoll: ") + what + " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// Host memory that the device maps: it is read and written while kernels run.
class HostStatus {
 public:
  HostStatus() {
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&status_), sizeof(Status), cudaHostAllocMapped),
               "allocating a status word");
    *status_ = {cuda_device::kRunning, -1};
  }
  ~HostStatus() { (void)cudaFreeHost(status_); }
  HostStatus(const HostStatus&) = delete;
  Status* get() const { return status_; }

 private:
  Status* status_ = nullptr;
};

class LocalGroup {
 public:
  LocalGroup(int world, int device, const cpu::Config& config, double timeout_seconds)
      : world_(world), device_(at::kCUDA, static_cast<c10::DeviceIndex>(device)) {
    if (world < 1 || world > cuda_device::kMaxRanks) {
      throw_usage("a local group has 1 to " + std::to_string(cuda_device::kMaxRanks) + " ranks, not " +
                  std::to_string(world));
    }
    const c10::cuda::CUDAGuard on(device_);
    int blocks = 0;
    check_cuda(cuda_device::resident_blocks(&blocks), "asking for the number of resident blocks");
    const int most = config.channels > 0 ? config.channels : kMaxChannels;
    channels_ = std::min(most, blocks / world);
    if (channels_ < 1) {
      throw_usage("this GPU holds " + std::to_string(blocks) + " blocks at once, too few for " + std::to_string(world) +
                  " ranks");
    }
    one_shot_max_bytes_ = config.one_shot_max_bytes;
    channel_min_bytes_ = std::max<size_t>(config.channel_min_bytes, 1);
    timeout_ns_ = static_cast<uint64_t>(std::min(timeout_seconds, 1e9) * 1e9);
    status_ = std::make_unique<HostStatus>();
    make_ranks(config);
  }

  ~LocalGroup() {
    try {
      last_.synchronize();  // the kernels use this object's memory
    } catch (...) {         // a device that has failed, or that is shut down at the end of the process
    }
  }
  LocalGroup(const LocalGroup&) = delete;

  // Each tensor is the input and the output of its rank.
  void all_reduce(const std::vector<at::Tensor>& tensors, const std::string& op, const std::string& algorithm) {
    check(tensors);
    throw_if_failed();
    const c10::cuda::CUDAGuard on(device_);
    const std::vector<Dense> dense(tensors.begin(), tensors.end());
    const size_t bytes = dense[0].memory().nbytes();
    GroupCall call{};
    call.ranks = reinterpret_cast<const GroupRank*>(ranks_.const_data_ptr());
    call.world = world_;
    call.channels = static_cast<int>(std::clamp<size_t>(bytes / channel_min_bytes_, 1, channels_));
    call.record.count = static_cast<uint64_t>(tensors[0].numel());
    call.record.collective = Collective::kAllReduce;
    call.record.dtype = reducible(tensors[0], "all_reduce");
    call.record.op = parse_op(op);
    call.record.algorithm =
        parse_algorithm(algorithm).value_or(bytes <= one_shot_max_bytes_ ? Algorithm::kOneShot : Algorithm::kTwoShot);
    call.status = status_->get();
    call.timeout_ns = timeout_ns_;
    const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
    const bool captured = is_capturing(stream);
    if (!captured) last_.block(at::cuda::getCurrentCUDAStream());  // one call at a time, whatever streams they are on
    for (int r = 0; r < world_; ++r) {
      dense[r].load();
      call.in[r] = call.out[r] = dense[r].memory().mutable_data_ptr();
    }
    check_cuda(cuda_device::all_reduce_group(call, stream), "launching the all-reduce of all ranks");
    if (!captured) last_.record(at::cuda::getCurrentCUDAStream());
    for (int r = 0; r < world_; ++r) {
      dense[r].store();
      if (!tensors[r].is_inference()) tensors[r].unsafeGetTensorImpl()->bump_version();
    }
  }

  void abort() { store_release(status_->get()->outcome, uint32_t{cuda_device::kAborted}); }

  int channels() const { return channels_; }
  size_t footprint() const {
    size_t bytes = ranks_.nbytes() + bases_.nbytes() + windows_.nbytes() + links_.nbytes();
    for (const at::Tensor& s : segments_) bytes += s.nbytes();
    return bytes;
  }

 private:
  // Beyond that more blocks move no more bytes.
  static constexpr int kMaxChannels = 64;

  // Segments (cells, slots, links; no heap), all zero, and on the device what the kernel needs to find them.
  void make_ranks(const cpu::Config& config) {
    const auto bytes_on_device = at::TensorOptions().dtype(at::kByte).device(device_);
    const size_t slot = std::max(round_up(config.slot_bytes, 64), size_t{64} * world_);
    const Geometry geometry{world_, channels_, config.link_slots, slot, round_up(config.link_bytes, 64), 0};
    std::vector<std::byte*> bases;
    for (int r = 0; r < world_; ++r) {
      segments_.push_back(at::zeros({static_cast<int64_t>(geometry.scratch_bytes())}, bytes_on_device));
      bases.push_back(reinterpret_cast<std::byte*>(segments_.back().mutable_data_ptr()));
    }
    bases_ = to_device(bases);
    windows_ = at::zeros({static_cast<int64_t>(sizeof(WindowState)) * channels_ * world_}, bytes_on_device);
    links_ = at::zeros({static_cast<int64_t>(sizeof(ChannelLinks)) * channels_ * world_}, bytes_on_device);
    std::vector<GroupRank> ranks;
    for (int r = 0; r < world_; ++r) {
      ranks.push_back({{r, geometry, reinterpret_cast<std::byte* const*>(bases_.const_data_ptr())},
                       reinterpret_cast<WindowState*>(windows_.mutable_data_ptr()) + r * channels_,
                       reinterpret_cast<ChannelLinks*>(links_.mutable_data_ptr()) + r * channels_});
    }
    ranks_ = to_device(ranks);
    check_cuda(cuda_device::prepare_group(reinterpret_cast<const GroupRank*>(ranks_.const_data_ptr()), world_,
                                          channels_, at::cuda::getCurrentCUDAStream().stream()),
               "preparing the ranks");
    check_cuda(cudaStreamSynchronize(at::cuda::getCurrentCUDAStream().stream()), "preparing the ranks");
  }

  static bool is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status{};
    check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a graph is captured");
    return status != cudaStreamCaptureStatusNone;
  }

  template <class T>
  at::Tensor to_device(const std::vector<T>& values) const {
    const auto size = static_cast<int64_t>(values.size() * sizeof(T));
    return at::from_blob(const_cast<T*>(values.data()), {size}, at::kByte).to(device_, /*non_blocking=*/false);
  }

  void check(const std::vector<at::Tensor>& tensors) const {
    if (static_cast<int>(tensors.size()) != world_) {
      throw_usage("all_reduce needs a tensor for each of the " + std::to_string(world_) + " ranks, not " +
                  std::to_string(tensors.size()));
    }
    for (const at::Tensor& t : tensors) {
      if (t.device() != device_) {
        throw_unsupported("all_reduce got a tensor on " + t.device().str() + ": this group's are on " + device_.str());
      }
      if (t.layout() != at::kStrided) throw_unsupported("all_reduce needs strided tensors: convert with .to_dense()");
      if (t.scalar_type() != tensors[0].scalar_type() || t.sizes() != tensors[0].sizes()) {
        throw Error(ErrorKind::kMismatch, "pycoll: all_reduce: the ranks' tensors differ in shape or dtype");
      }
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      for (size_t j = i + 1; j < tensors.size(); ++j) {
        const auto* a = static_cast<const char*>(tensors[i].const_data_ptr());
        const auto* b = static_cast<const char*>(tensors[j].const_data_ptr());
        if (tensors[i].is_contiguous() && a < b + tensors[j].nbytes() && b < a + tensors[i].nbytes()) {
          throw_usage("all_reduce: the tensors of ranks " + std::to_string(i) + " and " + std::to_string(j) +
                      " overlap");
        }
      }
    }
  }

  // What a kernel that has ended by now reported; terminal.
  void throw_if_failed() const {
    const Status& s = *status_->get();
    const uint32_t outcome = load_acquire(s.outcome);
    if (outcome == cuda_device::kAborted) throw Error(ErrorKind::kError, "pycoll: the local group was aborted");
    if (outcome == cuda_device::kTimedOut) {
      throw Error(ErrorKind::kTimeout,
                  "pycoll: a rank of the local group waited too long for rank " + std::to_string(s.rank), s.rank);
    }
  }

  const int world_;
  const at::Device device_;
  int channels_ = 0;
  size_t one_shot_max_bytes_ = 0, channel_min_bytes_ = 1;
  uint64_t timeout_ns_ = 0;
  std::unique_ptr<HostStatus> status_;
  at::cuda::CUDAEvent last_;  // the end of the last call
  std::vector<at::Tensor> segments_;
  at::Tensor bases_, windows_, links_, ranks_;
};

}  // namespace

void bind_local_group(py::module_& m) {
  py::class_<LocalGroup>(m, "LocalGroup", "Ranks that share a GPU and a process; see pycoll.LocalGroup.")
      .def(py::init<int, int, const cpu::Config&, double>(), py::arg("world_size"), py::arg("device"),
           py::arg("config"), py::arg("timeout"))
      .def("all_reduce", &LocalGroup::all_reduce, py::call_guard<py::gil_scoped_release>())
      .def("abort", &LocalGroup::abort)
      .def_property_readonly("channels", &LocalGroup::channels)
      .def_property_readonly("footprint", &LocalGroup::footprint);
}

}  // namespace pycoll::bindings
