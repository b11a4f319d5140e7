// Ranks each on a GPU of its own that all others reach: kernels that talk to one another, one launch a collective.
#pragma once

#include <ATen/cuda/CUDAEvent.h>

#include <atomic>
#include <condition_variable>
#include <thread>

#include "cpu/descriptors.h"
#include "cpu/first_fit.h"
#include "cuda/memory.h"
#include "torch/cuda/launcher.h"
#include "torch/device.h"

namespace pycoll::bindings {

// Blocks of a GPU that collectives of this process may hold at once, so that all of them fit on it together: only then
// can spinning kernels of several communicators not lock one another out (csrc/README.md, D3).
class ReservedBlocks {
 public:
  ReservedBlocks(int device, int wish);  // gets less when others hold much; at least 1, or throws Error
  ~ReservedBlocks();
  ReservedBlocks(const ReservedBlocks&) = delete;
  int count() const { return count_; }
  void keep(int count);  // gives the rest back

 private:
  const int device_;
  int count_ = 0;
};

class PeerGroup : public Device {
 public:
  PeerGroup(cpu::Communicator& host, const cpu::Config& config, at::Device device);
  ~PeerGroup() override;

  // The ranks map one another's memory; a collective. Empty, or why it cannot be: the same on all ranks.
  std::string meet();

  bool on_host() const override { return false; }
  void prepare(cpu::Call&) override {}
  void launch(const cpu::Call& call) override;
  c10::Stream stream() const override { return stream_; }
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) override;
  size_t footprint() const override;
  std::string describe() const override;

 private:
  // The heap on this rank's GPU: grows as tensors are made, and is mapped by peers as they come by.
  struct Heap;

  void make_segment();
  void send_segment();
  void map_segments();
  void join_multicast();
  void launch(const cpu::Call& call, const Choice& choice);
  uint64_t mapped_offset(const void* p, size_t bytes) const;
  void send_new_memory();
  void take_in_peers_memory();
  void watch();

  cpu::Communicator& host_;  // not in the destructor, nor in watch()
  const cpu::Communicator::Monitor monitor_;
  const at::Device device_;
  const int rank_;
  const at::cuda::CUDAStream stream_;
  cpu::Config config_;
  std::unique_ptr<ReservedBlocks> blocks_;
  Geometry geometry_{};
  cpu::DescriptorBox box_;
  std::vector<std::string> boxes_;  // of all ranks
  cuda_device::Physical segment_, multicast_;
  std::vector<cuda_device::Range> ranges_;  // [world] segment and heap of each rank
  cuda_device::Range multicast_range_;
  std::shared_ptr<Heap> heap_;
  std::unique_ptr<Launcher> launcher_;
  std::mutex lock_;  // of what launch() changes

  std::thread watcher_;
  std::mutex watching_;
  std::condition_variable stop_;
  bool stopping_ = false;
};

}  // namespace pycoll::bindings
