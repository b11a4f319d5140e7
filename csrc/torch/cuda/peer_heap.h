// The heap on a rank's GPU: grows as tensors are made, and is mapped by peers as they come by (csrc/README.md, G1 to G4).
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>

#include <mutex>
#include <optional>
#include <vector>

#include "core/layout.h"
#include "cpu/first_fit.h"
#include "cuda/memory.h"

namespace pycoll::bindings {

// Whoever uses its members holds its lock, but for the functions that take it: take(), give_back() and has_unsent().
struct PeerHeap {
  static constexpr size_t kGrain = Geometry::kPage, kStep = size_t{32} << 20;

  std::mutex lock;
  const at::Device device;
  const at::cuda::CUDAStream stream;    // the group's, of asynchronous calls
  std::byte* base = nullptr;            // of the heap, within this rank's range
  size_t limit = 0;                     // bytes of addresses
  cuda_device::Range* range = nullptr;  // null once closed: no more growth
  cpu::FirstFit blocks;
  struct Freed {
    size_t offset;
    at::cuda::CUDAEvent user, group;  // the ends of what may still use it: on the stream that freed it, on the group's
    bool ended() const noexcept;
  };
  std::vector<Freed> freed;  // came back, but not yet free
  struct Part {
    size_t begin;
    cuda_device::Physical memory;
  };
  std::vector<Part> parts;
  std::vector<size_t> sent;  // [world] how many parts each peer was sent
  int self = 0;
  // Keeps the addresses mapped while tensors live, also when the group is gone.
  std::vector<cuda_device::Range> kept;

  PeerHeap(at::Device d, const at::cuda::CUDAStream& s) : device(d), stream(s) {}
  ~PeerHeap();  // waits for the device: what is mapped may still be in use
  std::byte* take(size_t bytes);
  void give_back(std::byte* block);
  std::optional<size_t> find(size_t bytes);  // room, without waiting
  void grow(size_t bytes);
  bool has_unsent();
  uint64_t offset_of(const void* p, size_t bytes) const;
};

}  // namespace pycoll::bindings
