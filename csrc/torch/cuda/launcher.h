// Ranks whose blocks run on this GPU: their state in device memory, and the launches that use it, one at a time.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/communicator.h"
#include "cuda/launch.h"
#include "torch/errors.h"

namespace pycoll::bindings {

void check_cuda(int error, const char* doing);
void check_cuda(int error, const std::string& doing);
bool is_capturing(cudaStream_t stream);

// The shape of what each rank keeps on its GPU, apart from its heap.
Geometry device_geometry(const cpu::Config& config, int world, int channels);

// Which algorithm, on how many channels: what `auto` comes to on a GPU.
struct Choice {
  Algorithm algorithm;
  int channels;
};
Choice choose(const cpu::Config& config, const cpu::Call& call, int world, int channels, bool multicast);

class Launcher {
 public:
  // `bases` [world]: the ranks' segments, cells all zero. `here`: the ranks whose blocks are launched.
  Launcher(at::Device device, const Geometry& geometry, const std::vector<std::byte*>& bases,
           const std::vector<int>& here, std::byte* multicast, cpu::Names names = {});
  ~Launcher();  // waits for the last call: the kernels use this object's memory
  Launcher(const Launcher&) = delete;

  // On the current stream; after the call before, whatever stream that was on (but for what a graph holds). `call.ranks`
  // and `call.ranks_here` are set here.
  void launch(cuda_device::DeviceCall call, const cuda_device::DeviceCounts* counts);

  void wait();  // for the last call
  void set_ranks_that_left(uint32_t ranks);
  // Ends running calls, and makes later ones do nothing.
  void abort();
  // What a call that has ended by now came to, or null. Terminal.
  std::exception_ptr failure() const;
  size_t footprint() const { return memory_.nbytes() + bases_.nbytes(); }

 private:
  template <class T>
  at::Tensor to_device(const std::vector<T>& values) const;

  const at::Device device_;
  const int world_, here_;
  const cpu::Names names_;
  struct HostReport;
  std::unique_ptr<HostReport> report_;
  std::mutex lock_;
  at::cuda::CUDAEvent last_;  // the end of the last call
  at::Tensor memory_;         // windows, links and stop words of all ranks that are here
  at::Tensor bases_, ranks_;
};

}  // namespace pycoll::bindings
