#include "torch/cuda/peer_group.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <map>

#include "core/atomic.h"
#include "torch/cuda/agree.h"

namespace pycoll::bindings {

using cuda_device::Physical;
using cuda_device::Range;

namespace {

constexpr int kMostChannels = 32;  // of a communicator: more blocks move no more bytes over NVLink
constexpr size_t kHeapGrain = Geometry::kPage, kHeapStep = size_t{32} << 20;

std::mutex& reserved_lock() {
  static auto* lock = new std::mutex;  // never destroyed: communicators may outlive static destruction
  return *lock;
}
std::map<int, int>& reserved_blocks() {
  static auto* reserved = new std::map<int, int>;
  return *reserved;
}

}  // namespace

ReservedBlocks::ReservedBlocks(int device, int wish) : device_(device) {
  int resident = 0;
  check_cuda(cuda_device::resident_blocks(&resident), "asking for the number of resident blocks");
  const std::lock_guard guard(reserved_lock());
  const int left = resident - reserved_blocks()[device];
  if (left < 1) {
    throw Error(ErrorKind::kError,
                "pycoll: the communicators on this GPU already hold all the " + std::to_string(resident) +
                    " blocks that fit on it at once: close some, or give them fewer channels (Config.channels)");
  }
  count_ = std::clamp(left / 4, 1, wish);  // leaves some for communicators to come
  reserved_blocks()[device] += count_;
}

ReservedBlocks::~ReservedBlocks() { keep(0); }

void ReservedBlocks::keep(int count) {
  const std::lock_guard guard(reserved_lock());
  reserved_blocks()[device_] -= count_ - count;
  count_ = count;
}

struct PeerGroup::Heap {
  std::mutex lock;
  at::Device device;
  std::byte* base = nullptr;  // of the heap, within this rank's range
  size_t limit = 0;           // bytes of addresses
  Range* range = nullptr;     // null once closed: no more growth
  cpu::FirstFit blocks;
  std::vector<at::cuda::CUDAEvent> freed;  // when the memory that came back was last used
  struct Part {
    size_t begin;
    Physical memory;
  };
  std::vector<Part> parts;
  std::vector<size_t> sent;  // [world] how many parts each peer was sent
  int self = 0;
  // Keeps the addresses mapped while tensors live, also when the group is gone.
  std::vector<Range> kept;

  explicit Heap(at::Device d) : device(d) {}

  std::byte* take(size_t bytes) {
    const std::lock_guard guard(lock);
    const c10::cuda::CUDAGuard on(device);
    const size_t need = round_up(std::max<size_t>(bytes, 1), 512);
    std::optional<size_t> offset = blocks.take(need, 512);
    if (!offset) {
      if (range == nullptr) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
      if (blocks.size() + round_up(need, kHeapGrain) > limit) {
        throw Error(ErrorKind::kError, "pycoll: the shared heap on the GPU has no room for " + std::to_string(bytes) +
                                           " bytes (" + std::to_string(blocks.used()) + " of " + std::to_string(limit) +
                                           " in use): free tensors, or raise heap_bytes of `cuda_config`");
      }
      grow(smaller(round_up(need, kHeapStep), limit - blocks.size()));
      offset = blocks.take(need, 512);
    }
    // What used the memory before may still run, on another stream.
    for (at::cuda::CUDAEvent& event : freed) event.block(at::cuda::getCurrentCUDAStream());
    freed.clear();
    return base + *offset;
  }

  void give_back(std::byte* block) {
    const std::lock_guard guard(lock);
    try {
      const c10::cuda::CUDAGuard on(device);
      freed.emplace_back();
      freed.back().record(at::cuda::getCurrentCUDAStream());
    } catch (...) {  // a device that has failed: nobody will use the memory
    }
    blocks.give_back(static_cast<size_t>(block - base));
  }

  void grow(size_t bytes) {
    Physical memory = Physical::create(device.index(), bytes);
    range->append(memory);
    parts.push_back({blocks.size(), std::move(memory)});
    blocks.extend(bytes);
  }

  bool has_unsent() {
    const std::lock_guard guard(lock);
    for (size_t r = 0; r < sent.size(); ++r) {
      if (static_cast<int>(r) != self && sent[r] < parts.size()) return true;
    }
    return false;
  }

  uint64_t offset_of(const void* p, size_t bytes) const {
    const auto* begin = static_cast<const std::byte*>(p);
    if (begin < base || begin + bytes > base + blocks.size()) return kNotMapped;
    return static_cast<uint64_t>(begin - base);
  }
};

PeerGroup::PeerGroup(cpu::Communicator& host, const cpu::Config& config, at::Device device)
    : host_(host),
      monitor_(host.monitor()),
      device_(device),
      rank_(host.rank()),
      stream_(at::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
      config_(config),
      box_(host.world()),
      ranges_(host.world()),
      heap_(std::make_shared<Heap>(device)) {}

PeerGroup::~PeerGroup() {
  {
    const std::lock_guard guard(watching_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (watcher_.joinable()) watcher_.join();
  launcher_.reset();  // waits for the last call
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
    blocks_ =
        std::make_unique<ReservedBlocks>(device_.index(), config_.channels > 0 ? config_.channels : kMostChannels);
    config_.channels = blocks_->count();
  });
  if (!failure.empty()) return failure;
  Wishes mine{config_, {}};
  std::copy_n(box_.token().begin(), 32, mine.box);
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
  check_cuda(cudaMemset(range.data(), 0, geometry_.scratch_bytes()), "preparing the segment");
  check_cuda(cudaDeviceSynchronize(), "preparing the segment");
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
    if (!cpu::DescriptorBox::send(boxes_[r], host_.rank(), 0, descriptors, host_.timeout())) {
      throw Error(ErrorKind::kError, "pycoll: rank " + std::to_string(r) + " cannot be sent a descriptor", r);
    }
  }
}

// All ranks have sent theirs.
void PeerGroup::map_segments() {
  for (int missing = host_.world() - 1; missing > 0;) {
    const std::optional<cpu::Delivery> delivery = box_.take(std::chrono::milliseconds(1000));
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
  const bool joined = together([&] {
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
                          if (!cpu::DescriptorBox::send(boxes_[r], 0, 1, descriptors, host_.timeout())) {
                            throw_unsupported("a peer cannot be sent a descriptor");
                          }
                        }
                      }) &&
                      together([&] {
                        if (rank != 0) {
                          const std::optional<cpu::Delivery> delivery = box_.take(std::chrono::milliseconds(1000));
                          if (!delivery || delivery->sender != 0 || delivery->tag != 1)
                            throw_unsupported("nothing arrived");
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
    const Error error(ErrorKind::kError, e.what(), rank_);
    monitor_.fail(error);
    throw error;
  }
}

void PeerGroup::launch(const cpu::Call& call, const Choice& choice) {
  if (!is_capturing(at::cuda::getCurrentCUDAStream().stream())) take_in_peers_memory();
  const size_t bytes = call.count * size_of(call.dtype);
  size_t out_bytes = bytes;
  if (call.collective == Collective::kAllGather) out_bytes = bytes * host_.world();
  if (call.collective == Collective::kReduceScatter) out_bytes = bytes / host_.world();
  cuda_device::DeviceCall d{};
  d.channels = choice.channels;
  d.record = {.sequence = 0,  // of a graph's calls nobody knows it
              .count = call.count,
              .in_offset = mapped_offset(call.in, bytes),
              .out_offset = mapped_offset(call.out, out_bytes),
              .root = call.root,
              .collective = call.collective,
              .dtype = call.dtype,
              .op = call.op,
              .algorithm = choice.algorithm,
              .shape = call.shape};
  d.in[0] = call.in;
  d.out[0] = call.out;
  d.timeout_ns = static_cast<uint64_t>(host_.timeout().count()) * 1000000;
  launcher_->launch(d);
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

void PeerGroup::send_new_memory() {
  const std::lock_guard guard(heap_->lock);
  for (int r = 0; r < host_.world(); ++r) {
    if (r == host_.rank()) continue;
    for (size_t& next = heap_->sent[r]; next < heap_->parts.size(); ++next) {
      const Heap::Part& part = heap_->parts[next];
      const cpu::Fd descriptor(part.memory.share());
      const int descriptors[] = {descriptor.get()};
      const uint64_t tag = part.begin / kHeapGrain << 32 | part.memory.bytes() / kHeapGrain;
      if (!cpu::DescriptorBox::send(boxes_[r], host_.rank(), tag, descriptors, std::chrono::milliseconds(0))) break;
    }
  }
  store_release(host_.mapped_device_heap(host_.rank(), host_.rank()), uint64_t{heap_->blocks.size()});
}

void PeerGroup::take_in_peers_memory() {
  const int rank = host_.rank();
  if (heap_->has_unsent()) send_new_memory();
  for (int r = 0; r < host_.world(); ++r) {
    const auto behind = [&] {
      return r != rank && load_acquire(host_.mapped_device_heap(r, r)) > host_.mapped_device_heap(rank, r);
    };
    while (behind()) {
      const std::optional<cpu::Delivery> delivery = box_.take(std::chrono::milliseconds(0));
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
}

at::Tensor PeerGroup::empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  int64_t count = 1;
  for (const int64_t n : sizes) count *= n;
  try {
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
      if (const std::exception_ptr failed = launcher_->failure()) std::rethrow_exception(failed);
      monitor_.throw_if_any_rank_is_lost();
    } catch (const Error& e) {
      failure_->set(std::current_exception());
      monitor_.fail(e);
      launcher_->abort();
      return;
    }
  }
}

}  // namespace pycoll::bindings
