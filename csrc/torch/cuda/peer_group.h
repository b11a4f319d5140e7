// Ranks each on a GPU of its own that all others reach: kernels that talk to one another, one launch a collective.
#pragma once

#include <atomic>
#include <condition_variable>
#include <thread>

#include "torch/cuda/launcher.h"
#include "torch/cuda/peer_memory.h"
#include "torch/cuda/reserved_blocks.h"
#include "torch/device.h"

namespace pycoll::bindings {

class PeerGroup : public Device {
 public:
  PeerGroup(cpu::Communicator& host, const cpu::Config& config, at::Device device);
  ~PeerGroup() override;

  // The ranks map one another's memory; a collective. Empty, or why it cannot be: the same on all ranks.
  std::string meet();

  bool on_host() const override { return false; }
  void prepare(cpu::Call&) override {}
  void launch(const cpu::Call& call) override;
  void fail(const std::string& why) override;
  c10::Stream stream() const override { return stream_; }
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) override;
  size_t footprint() const override;
  std::string describe() const override;

 private:
  void launch(const cpu::Call& call, const Choice& choice);
  void watch();

  cpu::Communicator& host_;  // not in the destructor, nor in watch()
  const cpu::Communicator::Monitor monitor_;
  const at::Device device_;
  const int rank_;
  const at::cuda::CUDAStream stream_;
  cpu::Config config_;
  std::unique_ptr<ReservedBlocks> blocks_;
  Geometry geometry_{};
  PeerMemory memory_;
  std::unique_ptr<Launcher> launcher_;
  std::mutex lock_;  // of what launch() changes

  std::thread watcher_;
  std::mutex watching_;
  std::condition_variable stop_;
  bool stopping_ = false;
};

}  // namespace pycoll::bindings
