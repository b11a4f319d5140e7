// What moves messages from and to memory of a GPU: copies to and from the host's lanes, on streams that nothing else uses.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <vector>

#include "torch/cuda/launcher.h"
#include "torch/mail.h"

namespace pycoll::bindings {

namespace {

// Streams that wait for nothing but their own message: in torch's pool some would be those of collectives, which spin.
class Streams {
 public:
  static Streams& all() {
    static auto* streams = new Streams;  // never destroyed: messages may outlive static destruction
    return *streams;
  }

  cudaStream_t take(int device) {
    const std::lock_guard guard(lock_);
    std::vector<cudaStream_t>& idle = idle_[device];
    if (!idle.empty()) {
      const cudaStream_t stream = idle.back();
      idle.pop_back();
      return stream;
    }
    const c10::cuda::CUDAGuard on(static_cast<c10::DeviceIndex>(device));
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream for messages");
    return stream;
  }
  void give_back(int device, cudaStream_t stream) {
    const std::lock_guard guard(lock_);
    idle_[device].push_back(stream);
  }

 private:
  std::mutex lock_;
  std::map<int, std::vector<cudaStream_t>> idle_;
};

class StreamCourier : public Courier {
 public:
  explicit StreamCourier(at::Device device)
      : device_(device),
        raw_(Streams::all().take(device.index())),
        stream_(at::cuda::getStreamFromExternal(raw_, device.index())) {
    at::cuda::CUDAEvent ready;
    ready.record(at::cuda::getCurrentCUDAStream(device.index()));
    ready.block(stream_);
  }
  ~StreamCourier() override { Streams::all().give_back(device_.index(), raw_); }

  c10::Stream stream() const override { return stream_; }
  void combine(DType, ReduceOp, const CombineArgs&) override { throw_unsupported("a message reduces nothing"); }
  void copy(void* dst, const void* src, size_t bytes) override {
    const c10::cuda::CUDAGuard on(device_);
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, raw_), "copying a message");
  }
  bool done() override {
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);
    const cudaError_t state = cudaStreamQuery(raw_);
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();  // it would be taken for the next launch's
      return false;
    }
    check_cuda(state, "moving a message");
    return true;
  }

 private:
  const at::Device device_;
  const cudaStream_t raw_;
  const at::cuda::CUDAStream stream_;
};

}  // namespace

std::shared_ptr<Courier> make_courier(at::Device device) {
  const c10::cuda::CUDAGuard on(device);
  if (is_capturing(at::cuda::getCurrentCUDAStream(device.index()).stream())) {
    throw_unsupported("send and recv cannot be captured in a CUDA graph: they meet on the host");
  }
  return std::make_shared<StreamCourier>(device);
}

}  // namespace pycoll::bindings
