#include "torch/cuda/peer_group.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include "torch/cuda/agree.h"

namespace pycoll::bindings {

namespace {

constexpr int kMostChannels = 32;  // of a communicator: more blocks move no more bytes over NVLink

}  // namespace

PeerGroup::PeerGroup(cpu::Communicator& host, const cpu::Config& config, at::Device device)
    : host_(host),
      monitor_(host.monitor()),
      device_(device),
      rank_(host.rank()),
      stream_(at::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
      config_(config),
      memory_(host, device, stream_) {}

PeerGroup::~PeerGroup() {
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
  const auto if_it_can = [](const auto& f) {
    try {
      f();
    } catch (...) {  // a device that has failed, or that is shut down at the end of the process
    }
  };
  if (launcher_) {
    if_it_can([&] { launcher_->wait(); });  // while watch() still ends it where a peer is lost
    if_it_can([&] {                         // graphs that hold calls; what uses tensors in the heap
      const c10::cuda::CUDAGuard on(device_);
      c10::cuda::device_synchronize();
    });
  }
  {
    const std::lock_guard guard(watching_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (watcher_.joinable()) watcher_.join();
  launcher_.reset();
}

std::string PeerGroup::meet() {
  const c10::cuda::CUDAGuard on(device_);
  struct Wishes {
    cpu::Config config;
    char box[33];
  };
  Wishes mine{};
  std::string failure = agree(host_, [&] {
    if (host_.world() > cuda_device::kMaxRanks) throw_unsupported("there are more than 16 ranks");
    std::copy_n(memory_.open_box().begin(), 32, mine.box);
    blocks_ =
        std::make_unique<ReservedBlocks>(device_.index(), config_.channels > 0 ? config_.channels : kMostChannels);
    config_.channels = blocks_->count();
  });
  if (!failure.empty()) return failure;
  mine.config = config_;
  std::vector<cpu::Config> wishes;
  std::vector<std::string> boxes;
  for (const Wishes& w : gather(host_, mine)) {
    wishes.push_back(w.config);
    boxes.emplace_back(w.box);
  }
  config_ = cpu::Config::least(wishes);
  blocks_->keep(config_.channels);
  geometry_ = device_geometry(config_, host_.world(), config_.channels);
  geometry_.heap_bytes = round_up(config_.heap_bytes, PeerHeap::kGrain);
  failure = memory_.meet(std::move(boxes), geometry_);
  if (!failure.empty()) return failure;
  return agree(host_, [&] {
    launcher_ = std::make_unique<Launcher>(device_, geometry_, memory_.segments(), std::vector<int>{host_.rank()},
                                           memory_.multicast(), host_.names());
    const cpu::SignalsBlocked no_signals;
    watcher_ = std::thread([this] { watch(); });
  });
}

void PeerGroup::launch(const cpu::Call& call) {
  const std::lock_guard guard(lock_);
  failure_->throw_if_any();
  if (const std::exception_ptr failed = launcher_->failure()) std::rethrow_exception(failed);
  const Choice choice = choose(config_, call, host_.world(), geometry_.channels, memory_.multicast() != nullptr);
  const c10::cuda::CUDAGuard on(device_);
  try {
    launch(call, choice);
  } catch (const std::exception& e) {  // the others, who launch theirs, must not wait for this one
    fail(e.what());
    failure_->throw_if_any();
  }
}

void PeerGroup::fail(const std::string& why) {
  const std::string what = why.substr(why.starts_with("pycoll: ") ? 8 : 0);
  const Error error(ErrorKind::kError, "pycoll: " + host_.names().rank(rank_) + " could not launch a call: " + what,
                    rank_);
  failure_->set(std::make_exception_ptr(error));
  monitor_.fail(error);
  launcher_->abort();
}

void PeerGroup::launch(const cpu::Call& call, const Choice& choice) {
  const bool captured = is_capturing(at::cuda::getCurrentCUDAStream().stream());
  if (!captured) memory_.take_in_peers_memory();
  const size_t element = size_of(call.dtype);
  const InOut elements = elements_of(call, host_.world());
  cuda_device::DeviceCall d{};
  d.channels = choice.channels;
  d.record = {.sequence = 0,  // of a graph's calls nobody knows it
              .count = call.count,
              .in_offset = memory_.mapped_offset(call.in, elements.in * element),
              .out_offset = memory_.mapped_offset(call.out, elements.out * element),
              .root = call.root,
              .collective = call.collective,
              .dtype = call.dtype,
              .op = call.op,
              .algorithm = choice.algorithm,
              .shape = call.shape};
  d.in[0] = call.in;
  d.out[0] = call.out;
  const auto timeout = call.timeout.count() > 0 ? call.timeout : host_.timeout();
  d.timeout_ns = static_cast<uint64_t>(timeout.count()) * 1000000;
  cuda_device::DeviceCounts counts{};
  if (call.send_counts) {
    std::copy_n(call.send_counts, host_.world(), counts.send[0]);
    std::copy_n(call.recv_counts, host_.world(), counts.recv[0]);
  }
  cpu::Recorder& recorder = host_.launches();
  cpu::Entry entry = cpu::entry_of(call, d.record, host_.world(), d.channels, /*in_caller=*/true);
  entry.deed = cpu::Deed::kLaunch;
  entry.sequence = recorder.count();
  entry.flags = static_cast<uint8_t>(cpu::Entry::kOnGpu | (captured ? cpu::Entry::kCaptured : 0));
  const uint64_t begun = recorder.begin(entry);
  try {
    launcher_->launch(d, call.send_counts ? &counts : nullptr);
  } catch (...) {
    recorder.end(begun, /*failed=*/true);
    throw;
  }
  recorder.end(begun, /*failed=*/false);
}

at::Tensor PeerGroup::empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t n : sizes) count *= n;
  try {
    const c10::cuda::CUDAGuard on(device_);
    if (is_capturing(at::cuda::getCurrentCUDAStream().stream())) {
      throw_unsupported("empty() in the capture of a CUDA graph: make the tensor before");
    }
    std::byte* block = memory_.heap()->take(static_cast<size_t>(count) * options.dtype().itemsize());
    memory_.send_new_memory();
    const auto give_back = [heap = memory_.heap()](void* p) { heap->give_back(static_cast<std::byte*>(p)); };
    return at::from_blob(block, sizes, give_back, options.device(device_), device_);  // else torch asks whose it is
  } catch (const cuda_device::DriverError& e) {
    throw Error(ErrorKind::kError, e.what());
  }
}

size_t PeerGroup::footprint() const { return memory_.footprint() + launcher_->footprint(); }

std::string PeerGroup::describe() const {
  return "peers, this one on " + device_.str() + ", " + std::to_string(geometry_.channels) + " channels" +
         (memory_.multicast() ? ", multicast" : "");
}

// What stops the kernels of this rank reaches the others, and the other way round.
void PeerGroup::watch() {
  std::unique_lock guard(watching_);
  while (!stop_.wait_for(guard, std::chrono::milliseconds(20), [this] { return stopping_; })) {
    try {
      const uint32_t left = monitor_.ranks_that_left();  // first: who failed and then left has failed
      if (const std::exception_ptr failed = launcher_->failure()) std::rethrow_exception(failed);
      monitor_.throw_if_any_rank_is_lost();
      launcher_->set_ranks_that_left(left);
    } catch (const Error& e) {
      failure_->set(std::current_exception());
      monitor_.fail(e);
      launcher_->abort();
      return;
    }
  }
}

}  // namespace pycoll::bindings
