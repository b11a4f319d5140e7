// The memory that ranks, each on a GPU of its own, map of one another: segments, also at one address through the switch
// where that can be, and heaps as they grow (csrc/README.md, D2 and G1 to G4).
#pragma once

#include <ATen/cuda/CUDAEvent.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/descriptors.h"
#include "cuda/memory.h"
#include "torch/cuda/peer_heap.h"

namespace pycoll::bindings {

// Of one rank. One thread at a time, but for what says otherwise.
class PeerMemory {
 public:
  // `stream`: the group's, of asynchronous calls.
  PeerMemory(cpu::Communicator& host, at::Device device, const at::cuda::CUDAStream& stream);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;

  const std::string& open_box();  // for descriptors; its token
  // The ranks map one another's segments; a collective, once. `boxes`: the tokens of all ranks. Empty, or why it cannot be:
  // the same on all ranks.
  std::string meet(std::vector<std::string> boxes, const Geometry& geometry);

  std::vector<std::byte*> segments() const;  // [world], where this rank has mapped them
  std::byte* multicast() const;              // null without

  // Where memory lies in this rank's heap, if all peers have mapped it by now; else kNotMapped. Any thread.
  uint64_t mapped_offset(const void* p, size_t bytes) const;
  // What this rank's heap has grown by goes to the peers, and what has come of theirs is mapped. Neither waits.
  void send_new_memory();  // any thread
  void take_in_peers_memory();

  const std::shared_ptr<PeerHeap>& heap() const { return heap_; }
  size_t footprint() const;  // bytes; any thread

 private:
  void make_segment();
  void send_segment();
  void map_segments();
  void join_multicast();

  cpu::Communicator& host_;  // not in the destructor
  const at::Device device_;
  const int rank_;
  Geometry geometry_{};
  std::optional<cpu::DescriptorBox> box_;
  std::vector<std::string> boxes_;  // of all ranks
  cuda_device::Physical segment_, multicast_;
  std::vector<cuda_device::Range> ranges_;  // [world] segment and heap of each rank
  cuda_device::Range multicast_range_;
  std::shared_ptr<PeerHeap> heap_;
};

}  // namespace pycoll::bindings
