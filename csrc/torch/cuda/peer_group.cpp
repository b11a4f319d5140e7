#include "torch/cuda/peer_group.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include "core/atomic.h"
#include "torch/cuda/agree.h"

namespace pycoll::bindings {

using cuda_device::Physical;
using cuda_device::Range;

namespace {

constexpr int kMostChannels = 32;  // of a communicator: more blocks move no more bytes over NVLink
constexpr size_t kHeapGrain = PeerHeap::kGrain;

}  // namespace

PeerGroup::PeerGroup(cpu::Communicator& host, const cpu::Config& config, at::Device device)
    : host_(host),
      monitor_(host.monitor()),
      device_(device),
      rank_(host.rank()),
      stream_(at::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
      config_(config),
      ranges_(host.world()),
      heap_(std::make_shared<PeerHeap>(device, stream_)) {}

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
  const std::lock_guard guard(heap_->lock);
  heap_->range = nullptr;
  if (heap_->blocks.used() > 0) heap_->kept.push_back(std::move(ranges_[rank_]));  // some tensors live on
}

std::string PeerGroup::meet() {
  const c10::cuda::CUDAGuard on(device_);
  struct Wishes {
    cpu::Config config;
    char box[33];
  };
  std::string failure = agree(host_, [&] {
    if (host_.world() > cuda_device::kMaxRanks) throw_unsupported("there are more than 16 ranks");
    box_.emplace(host_.world());
    blocks_ =
        std::make_unique<ReservedBlocks>(device_.index(), config_.channels > 0 ? config_.channels : kMostChannels);
    config_.channels = blocks_->count();
  });
  if (!failure.empty()) return failure;
  Wishes mine{config_, {}};
  std::copy_n(box_->token().begin(), 32, mine.box);
  std::vector<cpu::Config> wishes;
  for (const Wishes& w : gather(host_, mine)) {
    wishes.push_back(w.config);
    boxes_.emplace_back(w.box);
  }
  config_ = cpu::Config::least(wishes);
  blocks_->keep(config_.channels);
  for (const auto step : {&PeerGroup::make_segment, &PeerGroup::send_segment, &PeerGroup::map_segments}) {
    failure = agree(host_, [&] { (this->*step)(); });
    if (!failure.empty()) return failure;
  }
  join_multicast();
  failure = agree(host_, [&] {
    std::vector<std::byte*> bases;
    for (const Range& range : ranges_) bases.push_back(range.data());
    launcher_ = std::make_unique<Launcher>(device_, geometry_, bases, std::vector<int>{host_.rank()},
                                           multicast_ ? multicast_range_.data() : nullptr);
    const cpu::SignalsBlocked no_signals;
    watcher_ = std::thread([this] { watch(); });
  });
  return failure;
}

void PeerGroup::make_segment() {
  geometry_ = device_geometry(config_, host_.world(), config_.channels);
  const size_t granularity = Physical::granularity(device_.index());
  if (kHeapGrain % granularity != 0) throw_unsupported("memory comes in pieces of more than 2 MiB");
  geometry_.heap_bytes = round_up(config_.heap_bytes, kHeapGrain);
  segment_ = Physical::create(device_.index(), geometry_.heap_offset());
  Range& range = ranges_[host_.rank()];
  range = Range(device_.index(), geometry_.segment_bytes());
  range.append(segment_);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  check_cuda(cudaMemsetAsync(range.data(), 0, geometry_.scratch_bytes(), stream), "preparing the segment");
  check_cuda(cudaStreamSynchronize(stream), "preparing the segment");
  heap_->base = range.data() + geometry_.heap_offset();
  heap_->range = &range;
  heap_->limit = geometry_.heap_bytes;
  heap_->sent.assign(host_.world(), 0);
  heap_->self = host_.rank();
}

void PeerGroup::send_segment() {
  const cpu::Fd descriptor(segment_.share());
  const int descriptors[] = {descriptor.get()};
  for (int r = 0; r < host_.world(); ++r) {
    if (r == host_.rank()) continue;
    if (cpu::DescriptorBox::send(boxes_[r], host_.rank(), 0, descriptors) != cpu::DescriptorBox::Sent::kYes) {
      throw Error(ErrorKind::kError, "pycoll: rank " + std::to_string(r) + " cannot be sent a descriptor", r);
    }
  }
}

// All ranks have sent theirs.
void PeerGroup::map_segments() {
  for (int missing = host_.world() - 1; missing > 0;) {
    const std::optional<cpu::Delivery> delivery = box_->take(std::chrono::milliseconds(1000));
    if (!delivery) throw Error(ErrorKind::kError, "pycoll: a peer's memory did not arrive");
    const int r = delivery->sender;
    if (r < 0 || r >= host_.world() || r == host_.rank() || ranges_[r].mapped() > 0) continue;
    const Physical theirs = Physical::import(delivery->descriptors.at(0).get(), geometry_.heap_offset());
    ranges_[r] = Range(device_.index(), geometry_.segment_bytes());
    ranges_[r].append(theirs);
    --missing;
  }
}

// The segments at one address, through the switch; without, where that fails anywhere.
void PeerGroup::join_multicast() {
  const int rank = host_.rank(), world = host_.world();
  const size_t bytes = geometry_.heap_offset();
  const auto together = [&](const auto& step) { return agree(host_, step).empty(); };
  const bool joined =
      together([&] {
        if (world < 2 || !Physical::has_multicast(device_.index()) ||
            bytes % Physical::multicast_granularity(world) != 0) {
          throw_unsupported("there is no multicast");
        }
      }) &&
      together([&] {
        if (rank != 0) return;
        multicast_ = Physical::create_multicast(world, bytes);
        const cpu::Fd descriptor(multicast_.share());
        const int descriptors[] = {descriptor.get()};
        for (int r = 1; r < world; ++r) {
          if (cpu::DescriptorBox::send(boxes_[r], 0, 1, descriptors) != cpu::DescriptorBox::Sent::kYes) {
            throw_unsupported("a peer cannot be sent a descriptor");
          }
        }
      }) &&
      together([&] {
        if (rank != 0) {
          const std::optional<cpu::Delivery> delivery = box_->take(std::chrono::milliseconds(1000));
          if (!delivery || delivery->sender != 0 || delivery->tag != 1) throw_unsupported("nothing arrived");
          multicast_ = Physical::import(delivery->descriptors.at(0).get(), bytes);
        }
        multicast_.add_device(device_.index());
      }) &&
      together([&] { multicast_.bind(segment_); }) &&  // waits for all devices, which are there by now
      together([&] {
        multicast_range_ = Range(device_.index(), bytes);
        multicast_range_.append(multicast_);
      });
  if (!joined) {
    multicast_range_ = Range();
    multicast_ = Physical();
  }
}

void PeerGroup::launch(const cpu::Call& call) {
  const std::lock_guard guard(lock_);
  failure_->throw_if_any();
  if (const std::exception_ptr failed = launcher_->failure()) std::rethrow_exception(failed);
  const Choice choice = choose(config_, call, host_.world(), geometry_.channels, static_cast<bool>(multicast_));
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
  const Error error(ErrorKind::kError, "pycoll: rank " + std::to_string(rank_) + " could not launch a call: " + what,
                    rank_);
  failure_->set(std::make_exception_ptr(error));
  monitor_.fail(error);
  launcher_->abort();
}

void PeerGroup::launch(const cpu::Call& call, const Choice& choice) {
  const bool captured = is_capturing(at::cuda::getCurrentCUDAStream().stream());
  if (!captured) take_in_peers_memory();
  const size_t element = size_of(call.dtype);
  const InOut elements = elements_of(call, host_.world());
  cuda_device::DeviceCall d{};
  d.channels = choice.channels;
  d.record = {.sequence = 0,  // of a graph's calls nobody knows it
              .count = call.count,
              .in_offset = mapped_offset(call.in, elements.in * element),
              .out_offset = mapped_offset(call.out, elements.out * element),
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

// Where memory lies in the heap, if all peers have mapped it by now.
uint64_t PeerGroup::mapped_offset(const void* p, size_t bytes) const {
  const std::lock_guard guard(heap_->lock);
  const uint64_t offset = heap_->offset_of(p, bytes);
  if (offset == kNotMapped) return kNotMapped;
  for (int r = 0; r < host_.world(); ++r) {
    if (r == host_.rank()) continue;
    if (load_acquire(host_.mapped_device_heap(r, host_.rank())) < offset + bytes) return kNotMapped;
  }
  return offset;
}

void PeerGroup::send_new_memory() try {
  const std::lock_guard guard(heap_->lock);
  for (int r = 0; r < host_.world(); ++r) {
    if (r == host_.rank()) continue;
    for (size_t& next = heap_->sent[r]; next < heap_->parts.size(); ++next) {
      const PeerHeap::Part& part = heap_->parts[next];
      const cpu::Fd descriptor(part.memory.share());
      const int descriptors[] = {descriptor.get()};
      const uint64_t tag = part.begin / kHeapGrain << 32 | part.memory.bytes() / kHeapGrain;
      if (cpu::DescriptorBox::send(boxes_[r], host_.rank(), tag, descriptors) != cpu::DescriptorBox::Sent::kYes) break;
    }
  }
  store_release(host_.mapped_device_heap(host_.rank(), host_.rank()), uint64_t{heap_->blocks.size()});
} catch (const std::exception&) {  // no descriptors left, say: tried again with the next call; till then it is staged
}

void PeerGroup::take_in_peers_memory() try {
  const int rank = host_.rank();
  if (heap_->has_unsent()) send_new_memory();
  for (int r = 0; r < host_.world(); ++r) {
    const auto behind = [&] {
      return r != rank && load_acquire(host_.mapped_device_heap(r, r)) > host_.mapped_device_heap(rank, r);
    };
    while (behind()) {
      const std::optional<cpu::Delivery> delivery = box_->take(std::chrono::milliseconds(0));
      if (!delivery) return;  // later
      const int sender = delivery->sender;
      const size_t begin = (delivery->tag >> 32) * kHeapGrain, bytes = (delivery->tag & 0xffffffff) * kHeapGrain;
      if (sender < 0 || sender >= host_.world() || sender == rank || delivery->descriptors.empty() ||
          begin + geometry_.heap_offset() != ranges_[sender].mapped()) {
        continue;
      }
      ranges_[sender].append(Physical::import(delivery->descriptors[0].get(), bytes));
      store_release(host_.mapped_device_heap(rank, sender), uint64_t{begin + bytes});
    }
  }
} catch (const std::exception&) {  // it stays unmapped here, and is staged
}

at::Tensor PeerGroup::empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t n : sizes) count *= n;
  try {
    const c10::cuda::CUDAGuard on(device_);
    if (is_capturing(at::cuda::getCurrentCUDAStream().stream())) {
      throw_unsupported("empty() in the capture of a CUDA graph: make the tensor before");
    }
    std::byte* block = heap_->take(static_cast<size_t>(count) * options.dtype().itemsize());
    send_new_memory();
    const auto give_back = [heap = heap_](void* p) { heap->give_back(static_cast<std::byte*>(p)); };
    return at::from_blob(block, sizes, give_back, options.device(device_));
  } catch (const cuda_device::DriverError& e) {
    throw Error(ErrorKind::kError, e.what());
  }
}

size_t PeerGroup::footprint() const {
  const std::lock_guard guard(heap_->lock);
  return segment_.bytes() + launcher_->footprint() + heap_->blocks.size();
}

std::string PeerGroup::describe() const {
  return "peers, this one on " + device_.str() + ", " + std::to_string(geometry_.channels) + " channels" +
         (multicast_ ? ", multicast" : "");
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
