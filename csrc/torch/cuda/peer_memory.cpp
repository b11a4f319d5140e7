#include "torch/cuda/peer_memory.h"

#include <ATen/cuda/CUDAContext.h>
#include <cuda_runtime_api.h>

#include "core/atomic.h"
#include "torch/cuda/agree.h"
#include "torch/cuda/launcher.h"

namespace pycoll::bindings {

using cuda_device::Physical;
using cuda_device::Range;

namespace {

constexpr size_t kHeapGrain = PeerHeap::kGrain;

}  // namespace

PeerMemory::PeerMemory(cpu::Communicator& host, at::Device device, const at::cuda::CUDAStream& stream)
    : host_(host),
      device_(device),
      rank_(host.rank()),
      ranges_(host.world()),
      heap_(std::make_shared<PeerHeap>(device, stream)) {}

PeerMemory::~PeerMemory() {
  const std::lock_guard guard(heap_->lock);
  heap_->range = nullptr;
  if (heap_->blocks.used() > 0) heap_->kept.push_back(std::move(ranges_[rank_]));  // some tensors live on
}

const std::string& PeerMemory::open_box() { return box_.emplace(host_.world()).token(); }

std::string PeerMemory::meet(std::vector<std::string> boxes, const Geometry& geometry) {
  boxes_ = std::move(boxes);
  geometry_ = geometry;
  for (const auto step : {&PeerMemory::make_segment, &PeerMemory::send_segment, &PeerMemory::map_segments}) {
    const std::string failure = agree(host_, [&] { (this->*step)(); });
    if (!failure.empty()) return failure;
  }
  join_multicast();
  return "";
}

std::vector<std::byte*> PeerMemory::segments() const {
  std::vector<std::byte*> bases;
  for (const Range& range : ranges_) bases.push_back(range.data());
  return bases;
}

std::byte* PeerMemory::multicast() const { return multicast_ ? multicast_range_.data() : nullptr; }

void PeerMemory::make_segment() {
  const size_t granularity = Physical::granularity(device_.index());
  if (kHeapGrain % granularity != 0) throw_unsupported("memory comes in pieces of more than 2 MiB");
  segment_ = Physical::create(device_.index(), geometry_.heap_offset());
  Range& range = ranges_[rank_];
  range = Range(device_.index(), geometry_.segment_bytes());
  range.append(segment_);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  check_cuda(cudaMemsetAsync(range.data(), 0, geometry_.scratch_bytes(), stream), "preparing the segment");
  check_cuda(cudaStreamSynchronize(stream), "preparing the segment");
  heap_->base = range.data() + geometry_.heap_offset();
  heap_->range = &range;
  heap_->limit = geometry_.heap_bytes;
  heap_->sent.assign(host_.world(), 0);
  heap_->self = rank_;
}

void PeerMemory::send_segment() {
  const cpu::Fd descriptor(segment_.share());
  const int descriptors[] = {descriptor.get()};
  for (int r = 0; r < host_.world(); ++r) {
    if (r == rank_) continue;
    if (cpu::DescriptorBox::send(boxes_[r], rank_, 0, descriptors) != cpu::DescriptorBox::Sent::kYes) {
      throw Error(ErrorKind::kError, "pycoll: " + host_.names().rank(r) + " cannot be sent a descriptor", r);
    }
  }
}

// All ranks have sent theirs.
void PeerMemory::map_segments() {
  for (int missing = host_.world() - 1; missing > 0;) {
    const std::optional<cpu::Delivery> delivery = box_->take(std::chrono::milliseconds(1000));
    if (!delivery) throw Error(ErrorKind::kError, "pycoll: a peer's memory did not arrive");
    const int r = delivery->sender;
    if (r < 0 || r >= host_.world() || r == rank_ || ranges_[r].mapped() > 0) continue;
    const Physical theirs = Physical::import(delivery->descriptors.at(0).get(), geometry_.heap_offset());
    ranges_[r] = Range(device_.index(), geometry_.segment_bytes());
    ranges_[r].append(theirs);
    --missing;
  }
}

// The segments at one address, through the switch; without, where that fails anywhere.
void PeerMemory::join_multicast() {
  const int world = host_.world();
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
        if (rank_ != 0) return;
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
        if (rank_ != 0) {
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

uint64_t PeerMemory::mapped_offset(const void* p, size_t bytes) const {
  const std::lock_guard guard(heap_->lock);
  const uint64_t offset = heap_->offset_of(p, bytes);
  if (offset == kNotMapped) return kNotMapped;
  for (int r = 0; r < host_.world(); ++r) {
    if (r == rank_) continue;
    if (load_acquire(host_.mapped_device_heap(r, rank_)) < offset + bytes) return kNotMapped;
  }
  return offset;
}

void PeerMemory::send_new_memory() try {
  const std::lock_guard guard(heap_->lock);
  for (int r = 0; r < host_.world(); ++r) {
    if (r == rank_) continue;
    for (size_t& next = heap_->sent[r]; next < heap_->parts.size(); ++next) {
      const PeerHeap::Part& part = heap_->parts[next];
      const cpu::Fd descriptor(part.memory.share());
      const int descriptors[] = {descriptor.get()};
      const uint64_t tag = part.begin / kHeapGrain << 32 | part.memory.bytes() / kHeapGrain;
      if (cpu::DescriptorBox::send(boxes_[r], rank_, tag, descriptors) != cpu::DescriptorBox::Sent::kYes) break;
    }
  }
  store_release(host_.mapped_device_heap(rank_, rank_), uint64_t{heap_->blocks.size()});
} catch (const std::exception&) {  // no descriptors left, say: tried again with the next call; till then it is staged
}

void PeerMemory::take_in_peers_memory() try {
  if (heap_->has_unsent()) send_new_memory();
  for (int r = 0; r < host_.world(); ++r) {
    const auto behind = [&] {
      return r != rank_ && load_acquire(host_.mapped_device_heap(r, r)) > host_.mapped_device_heap(rank_, r);
    };
    while (behind()) {
      const std::optional<cpu::Delivery> delivery = box_->take(std::chrono::milliseconds(0));
      if (!delivery) return;  // later
      const int sender = delivery->sender;
      const size_t begin = (delivery->tag >> 32) * kHeapGrain, bytes = (delivery->tag & 0xffffffff) * kHeapGrain;
      if (sender < 0 || sender >= host_.world() || sender == rank_ || delivery->descriptors.empty() ||
          begin + geometry_.heap_offset() != ranges_[sender].mapped()) {
        continue;
      }
      ranges_[sender].append(Physical::import(delivery->descriptors[0].get(), bytes));
      store_release(host_.mapped_device_heap(rank_, sender), uint64_t{begin + bytes});
    }
  }
} catch (const std::exception&) {  // it stays unmapped here, and is staged
}

size_t PeerMemory::footprint() const {
  const std::lock_guard guard(heap_->lock);
  return segment_.bytes() + heap_->blocks.size();
}

}  // namespace pycoll::bindings
