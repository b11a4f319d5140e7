#include "torch/cuda/peer_heap.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <string>

#include "core/record.h"
#include "cpu/error.h"
#include "torch/cuda/launcher.h"
#include "torch/gil.h"

namespace pycoll::bindings {

using cuda_device::Physical;

namespace {
constexpr size_t kAlignment = 512;
}  // namespace

PeerHeap::~PeerHeap() {
  const GilReleased others_run;  // the last owner may be Python, of a storage say
  try {
    const c10::cuda::CUDAGuard on(device);
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);
    c10::cuda::device_synchronize();
  } catch (...) {  // a device that has failed, or that is shut down at the end of the process
  }
  kept.clear();  // here, as unmapping may wait too
  parts.clear();
}

bool PeerHeap::Freed::ended() const noexcept {
  try {
    return user.query() && group.query();
  } catch (...) {  // a device that has failed
    return false;
  }
}

std::optional<size_t> PeerHeap::find(size_t bytes) {
  std::erase_if(freed, [this](const Freed& f) {
    const bool ended = f.ended();
    if (ended) blocks.give_back(f.offset);
    return ended;
  });
  return blocks.take(bytes, kAlignment);
}

std::byte* PeerHeap::take(size_t bytes) {
  const std::lock_guard guard(lock);
  const c10::cuda::CUDAGuard on(device);
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
  const size_t need = round_up(std::max<size_t>(bytes, 1), kAlignment);
  std::optional<size_t> offset = find(need);
  if (!offset && range != nullptr && blocks.size() + round_up(need, kGrain) <= limit) {
    try {
      grow(smaller(round_up(need, kStep), limit - blocks.size()));
      offset = find(need);
    } catch (const cuda_device::DriverError&) {
      if (freed.empty()) throw;
    }
  }
  if (!offset) {  // what was freed is the last hope
    for (Freed& f : freed) {
      f.user.synchronize();
      f.group.synchronize();
    }
    offset = find(need);
  }
  if (offset) return base + *offset;
  if (range == nullptr) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  throw Error(ErrorKind::kError, "pycoll: the shared heap on the GPU has no room for " + std::to_string(bytes) +
                                     " bytes (" + std::to_string(blocks.used()) + " of " + std::to_string(limit) +
                                     " in use): free tensors, or raise heap_bytes of `cuda_config`");
}

void PeerHeap::give_back(std::byte* block) {
  std::unique_lock guard(lock, std::try_to_lock);
  if (!guard) {  // take() holds it while it waits for the GPU
    const GilReleased others_run;
    guard.lock();
  }
  try {
    const c10::cuda::CUDAGuard on(device);
    const at::cuda::CUDAStream current = at::cuda::getCurrentCUDAStream();
    // Freed within a capture: the graph's replays may use it as long as there is a heap.
    if (is_capturing(current.stream()) || is_capturing(stream.stream())) return;
    Freed f{static_cast<size_t>(block - base), {}, {}};
    f.user.record(current);
    f.group.record(stream);
    freed.push_back(std::move(f));
  } catch (...) {  // a device that has failed: nobody will use the memory
  }
}

void PeerHeap::grow(size_t bytes) {
  Physical memory = Physical::create(device.index(), bytes);
  range->append(memory);
  parts.push_back({blocks.size(), std::move(memory)});
  blocks.extend(bytes);
}

bool PeerHeap::has_unsent() {
  const std::lock_guard guard(lock);
  for (size_t r = 0; r < sent.size(); ++r) {
    if (static_cast<int>(r) != self && sent[r] < parts.size()) return true;
  }
  return false;
}

uint64_t PeerHeap::offset_of(const void* p, size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(p);
  if (begin < base || begin + bytes > base + blocks.size()) return kNotMapped;
  return static_cast<uint64_t>(begin - base);
}

}  // namespace pycoll::bindings
