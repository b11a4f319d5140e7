#include "torch/cuda/launcher.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/atomic.h"
#include "core/words.h"
#include "cpu/mismatch.h"
#include "torch/gil.h"

namespace pycoll::bindings {

using cuda_device::DeviceRank;
using cuda_device::Report;

void check_cuda(int error, const char* doing) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // not again at somebody else's next call
  throw Error(ErrorKind::kError,
              std::string("pycoll: ") + doing + " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}
void check_cuda(int error, const std::string& doing) { check_cuda(error, doing.c_str()); }

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  check_cuda(cudaStreamIsCapturing(stream, &status), "asking whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

Geometry device_geometry(const cpu::Config& config, int world, int channels) {
  const size_t slot = std::max(round_up(config.slot_bytes, 64), size_t{64} * world);
  const size_t words = config.word_bytes > 0 ? round_up(std::max(config.word_bytes, kLeastWordBytes), 128) : 0;
  return {world, channels, config.link_slots, slot, round_up(config.link_bytes, 64), 0, words};
}

Choice choose(const cpu::Config& config, const cpu::Call& call, int world, int channels, bool multicast) {
  const InOut elements = elements_of(call.collective, call.count, world);
  const size_t bytes = std::max(elements.in, elements.out) * size_of(call.dtype);
  const auto lanes = [&](size_t bytes_a_channel) {
    return static_cast<int>(std::clamp<size_t>(bytes / bytes_a_channel, 1, channels));
  };
  const Choice direct{Algorithm::kDirect, lanes(config.channel_min_bytes)};
  if (call.collective == Collective::kAllToAll) return {Algorithm::kDirect, channels};  // ranks know no size in common
  if (call.collective != Collective::kAllReduce) return direct;
  if (world == 1) return {Algorithm::kOneShot, direct.channels};
  const bool words = config.word_bytes > 0;
  const bool summable =
      call.dtype == DType::kFloat32 || call.dtype == DType::kFloat16 || call.dtype == DType::kBFloat16;
  const bool in_switch = multicast && call.op == ReduceOp::kSum && summable;
  Algorithm a = in_switch && world > 2 ? Algorithm::kMultimem : Algorithm::kTwoShot;
  if (bytes <= config.one_shot_max_bytes) a = Algorithm::kOneShot;
  if (words && bytes <= config.two_shot_ll_max_bytes) a = Algorithm::kTwoShotLl;
  if (words && bytes <= config.one_shot_ll_max_bytes) a = Algorithm::kOneShotLl;
  if (call.algorithm) a = *call.algorithm;
  const bool uses_words = a == Algorithm::kOneShotLl || a == Algorithm::kTwoShotLl;
  if (uses_words && !words) throw_usage(std::string(name(a)) + " needs Config.word_bytes");
  if (a == Algorithm::kMultimem && !in_switch) {
    throw_unsupported(
        "multimem is there for sums of float32, float16 and bfloat16, among GPUs that a switch with multicast "
        "(NVSwitch) "
        "joins");
  }
  // A unit of 8 bytes for each thread.
  return {a, uses_words ? lanes(cuda_device::kThreads * kUnitBytes) : direct.channels};
}

// In memory of the host that the device maps.
struct Launcher::HostReport {
  Report* report = nullptr;

  HostReport() {
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&report), sizeof(Report), cudaHostAllocMapped),
               "allocating a report");
    *report = {};
  }
  ~HostReport() { (void)cudaFreeHost(report); }
  HostReport(const HostReport&) = delete;
};

Launcher::Launcher(at::Device device, const Geometry& geometry, const std::vector<std::byte*>& bases,
                   const std::vector<int>& here, std::byte* multicast, cpu::Names names)
    : device_(device), world_(geometry.world), here_(static_cast<int>(here.size())), names_(std::move(names)) {
  if (geometry.world > cuda_device::kMaxRanks) {
    throw_unsupported("a group of GPUs has at most " + std::to_string(cuda_device::kMaxRanks) + " ranks, not " +
                      std::to_string(geometry.world));
  }
  const c10::cuda::CUDAGuard on(device_);
  report_ = std::make_unique<HostReport>();
  bases_ = to_device(bases);
  const size_t windows = round_up(geometry.channels * sizeof(WindowState), 128);
  const size_t links = round_up(geometry.channels * sizeof(ChannelLinks), 128);
  const size_t each = windows + links + 128;
  memory_ = at::empty({static_cast<int64_t>(each) * here_}, at::TensorOptions().dtype(at::kByte).device(device_));
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  check_cuda(cudaMemsetAsync(memory_.mutable_data_ptr(), 0, memory_.nbytes(), stream), "preparing the ranks");
  std::vector<DeviceRank> ranks;
  for (int i = 0; i < here_; ++i) {
    auto* mine = static_cast<std::byte*>(memory_.mutable_data_ptr()) + i * each;
    ranks.push_back({{here[i], geometry, reinterpret_cast<std::byte* const*>(bases_.const_data_ptr()), multicast},
                     reinterpret_cast<WindowState*>(mine),
                     reinterpret_cast<ChannelLinks*>(mine + windows),
                     reinterpret_cast<uint32_t*>(mine + windows + links),
                     report_->report});
  }
  ranks_ = to_device(ranks);
  check_cuda(cuda_device::prepare_ranks(reinterpret_cast<const DeviceRank*>(ranks_.const_data_ptr()), here_,
                                        geometry.channels, stream),
             "preparing the ranks");
  check_cuda(cudaStreamSynchronize(stream), "preparing the ranks");
}

Launcher::~Launcher() {
  const GilReleased others_run;                                                        // a LocalGroup's may be Python's
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
  try {
    wait();
  } catch (...) {  // a device that has failed, or that is shut down at the end of the process
  }
}

void Launcher::launch(cuda_device::DeviceCall call, const cuda_device::DeviceCounts* counts) {
  const std::lock_guard one_at_a_time(lock_);
  const c10::cuda::CUDAGuard on(device_);
  const at::cuda::CUDAStream stream = at::cuda::getCurrentCUDAStream();
  call.ranks = reinterpret_cast<const DeviceRank*>(ranks_.const_data_ptr());
  call.ranks_here = here_;
  const bool captured = is_capturing(stream.stream());
  if (!captured) last_.block(stream);
  check_cuda(cuda_device::launch_collective(call, counts, stream.stream()),
             std::string("launching ") + name(call.record.collective));
  if (!captured) last_.record(stream);
}

void Launcher::wait() { last_.synchronize(); }

void Launcher::set_ranks_that_left(uint32_t ranks) { store_release(report_->report->left, ranks); }

void Launcher::abort() {
  uint32_t& outcome = report_->report->outcome;
  if (load_acquire(outcome) == cuda_device::kRunning) store_release(outcome, uint32_t{cuda_device::kAborted});
}

std::exception_ptr Launcher::failure() const {
  const Report& report = *report_->report;
  switch (load_acquire(report.outcome)) {
    case cuda_device::kAborted:
      return std::make_exception_ptr(Error(ErrorKind::kError, "pycoll: the group was aborted"));
    case cuda_device::kTimedOut:
      return std::make_exception_ptr(Error(ErrorKind::kTimeout,
                                           "pycoll: a kernel waited too long for " + names_.rank(report.rank) +
                                               ". Did it make this call? Raise the timeout if it is slow",
                                           report.rank));
    case cuda_device::kCountsDiffer:
      return std::make_exception_ptr(
          Error(ErrorKind::kMismatch, cpu::counts_text(report.rank, report.to, report.sent, report.expected, names_)));
    case cuda_device::kLeft:
      return std::make_exception_ptr(
          Error(ErrorKind::kPeerLost,
                "pycoll: " + names_.rank(report.rank) +
                    " has left: it closed its communicator while a kernel still waits for it. "
                    "Do all ranks make the same calls?",
                report.rank));
    case cuda_device::kMismatched: {
      const std::vector<CallRecord> records(report.records, report.records + world_);
      return std::make_exception_ptr(Error(ErrorKind::kMismatch, cpu::mismatch_text(records, names_)));
    }
    default:
      return nullptr;
  }
}

template <class T>
at::Tensor Launcher::to_device(const std::vector<T>& values) const {
  const auto size = static_cast<int64_t>(values.size() * sizeof(T));
  return at::from_blob(const_cast<T*>(values.data()), {size}, at::kByte).to(device_, /*non_blocking=*/false);
}

}  // namespace pycoll::bindings
