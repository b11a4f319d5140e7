// Ranks that share a GPU and a process: each collective is one cooperative launch that holds all ranks' blocks.
#pragma once

#include "torch/cuda/launcher.h"

namespace pycoll::bindings {

class LocalGroup {
 public:
  LocalGroup(int world, at::Device device, const cpu::Config& config, std::chrono::milliseconds timeout);

  // On the current stream. `calls` [world]: of the ranks, all the same but for their memory; any that the GPU reaches
  // will do.
  void launch(const std::vector<const cpu::Call*>& calls);

  void abort() { launcher_->abort(); }
  std::exception_ptr failure() const { return launcher_->failure(); }
  int world() const { return world_; }
  at::Device device() const { return device_; }
  int channels() const { return channels_; }
  size_t footprint() const { return segments_.nbytes() + launcher_->footprint(); }

 private:
  // Beyond that more blocks move no more bytes.
  static constexpr int kMostChannels = 64;

  const int world_;
  const at::Device device_;
  const cpu::Config config_;
  const std::chrono::milliseconds timeout_;
  int channels_ = 0;
  at::Tensor segments_;
  std::unique_ptr<Launcher> launcher_;
};

}  // namespace pycoll::bindings
