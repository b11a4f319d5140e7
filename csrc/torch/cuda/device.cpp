// How the ranks of a communicator meet on GPUs:
//   each on a GPU of its own that all others reach: kernels that talk to one another (torch/cuda/peer_group.h);
//   as threads of one process on one GPU: one launch for all, when all have come (Met, below);
//   else, as processes that share a GPU or on GPUs that do not reach one another: step by step (Stepped, below).
#include "torch/device.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <set>

#include "torch/cuda/agree.h"
#include "torch/cuda/local_group.h"
#include "torch/cuda/peer_group.h"

namespace pycoll::bindings {

namespace {

// The host-stepped executor. Its slots are the CPU's, in memory of the host that every GPU reaches: no memory of a GPU
// is shared, so it works wherever processes share a machine. Each verb is one kernel or copy, and nothing spins there.
class Stepped : public Device, private cpu::Mover {
 public:
  Stepped(cpu::Communicator& host, at::Device device, const std::string& why)
      : host_(host),
        device_(device),
        why_(why),
        stream_(at::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())) {
    const std::string failure = agree(host, [&] { map_segments(); });
    if (!failure.empty()) {
      unmap_segments();
      throw_unsupported("these ranks' GPUs cannot communicate: " + failure);
    }
  }
  ~Stepped() override {
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);
    (void)cudaStreamSynchronize(stream_.stream());  // kernels use the segments
    unmap_segments();
  }

  bool on_host() const override { return true; }
  void prepare(cpu::Call& call) override {
    const c10::cuda::CUDAGuard on(device_);
    if (is_capturing(at::cuda::getCurrentCUDAStream().stream())) {
      throw_unsupported(std::string(name(call.collective)) + " cannot be captured in a CUDA graph here: " + why_ +
                        ", so the ranks meet on the host");
    }
    call.mover = this;
  }
  void launch(const cpu::Call&) override {}
  c10::Stream stream() const override { return stream_; }
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) override {
    return at::empty(sizes, options);
  }
  size_t footprint() const override { return 0; }
  std::string describe() const override { return "step by step on " + device_.str() + ": " + why_; }

 private:
  void combine(DType dtype, ReduceOp op, const CombineArgs& args) override {
    const c10::cuda::CUDAGuard on(device_);
    cuda_device::StepCall call{};
    call.dtype = dtype;
    call.op = op;
    call.dst_count = args.dst_count;
    call.src_count = args.src_count;
    call.world = args.world;
    call.wire_sources = args.wire_sources;
    call.final = args.final;
    call.count = args.count;
    std::copy_n(args.src, args.src_count, call.src);
    std::copy_n(args.dst, args.dst_count, call.dst);
    check_cuda(cuda_device::launch_step(call, stream_.stream()), "launching a step");
  }
  void copy(void* dst, const void* src, size_t bytes) override {
    const c10::cuda::CUDAGuard on(device_);
    check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, stream_.stream()), "copying");
  }
  bool done() override {
    const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);  // others may be capturing
    const cudaError_t state = cudaStreamQuery(stream_.stream());
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();  // it would be taken for the next launch's
      return false;
    }
    check_cuda(state, "a step");
    return true;
  }

  void map_segments() {
    if (host_.world() > cuda_device::kMaxRanks) {
      throw_unsupported("there are more than " + std::to_string(cuda_device::kMaxRanks) + " ranks");
    }
    const c10::cuda::CUDAGuard on(device_);
    int same_address = 0;
    check_cuda(cudaDeviceGetAttribute(&same_address, cudaDevAttrCanUseHostPointerForRegisteredMem, device_.index()),
               "asking what the GPU can do");
    if (same_address == 0) throw_unsupported("the GPU cannot use the host's addresses");
    for (std::byte* base : host_.segments()) {
      check_cuda(cudaHostRegister(base, host_.geometry().scratch_bytes(), cudaHostRegisterPortable),
                 "mapping memory of the host into the GPU");
      registered_.push_back(base);
    }
  }
  void unmap_segments() {
    for (std::byte* base : registered_) (void)cudaHostUnregister(base);
    registered_.clear();
  }

  cpu::Communicator& host_;
  const at::Device device_;
  const std::string why_;
  const at::cuda::CUDAStream stream_;
  std::vector<std::byte*> registered_;
};

// Ranks that are threads of this process, on one GPU. When all have come, rank 0 launches for all.
class Met : public Device, private cpu::Meeting {
 public:
  Met(cpu::Communicator& host, const cpu::Config& config, at::Device device)
      : host_(host),
        device_(device),
        stream_(at::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
        config_(config) {
    for (const auto& packed : gather(host, stream_.pack3())) {
      streams_.push_back(at::cuda::CUDAStream::unpack3(packed.stream_id, packed.device_index, packed.device_type));
    }
    const std::string failure = agree(host, [&] {
      if (host.rank() == 0) group_.emplace(host.world(), device, config, host.timeout());
    });
    if (!failure.empty()) throw_unsupported("these ranks cannot share a GPU: " + failure);
  }

  bool on_host() const override { return true; }
  void prepare(cpu::Call& call) override {
    const c10::cuda::CUDAGuard on(device_);
    if (is_capturing(at::cuda::getCurrentCUDAStream().stream())) {
      throw_unsupported(std::string(name(call.collective)) +
                        " of ranks that are threads cannot be captured in a CUDA graph: use pycoll.LocalGroup");
    }
    (void)choose(config_, call, host_.world(), /*channels=*/1, /*multicast=*/false);  // throws here, not in the meeting
    call.meeting = this;
  }
  void launch(const cpu::Call&) override {}
  c10::Stream stream() const override { return stream_; }
  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) override {
    return at::empty(sizes, options);
  }
  size_t footprint() const override { return group_ ? group_->footprint() : 0; }
  std::string describe() const override { return "threads that share " + device_.str(); }

 private:
  // The other ranks wait.
  void run(const std::vector<const cpu::Call*>& calls) override {
    const c10::cuda::CUDAGuard on(device_);
    const c10::cuda::CUDAStreamGuard on_stream(stream_);
    for (const at::cuda::CUDAStream& stream : streams_) {
      at::cuda::CUDAEvent here;
      here.record(stream);
      here.block(stream_);
    }
    group_->launch(calls);
    at::cuda::CUDAEvent done;
    done.record(stream_);
    for (const at::cuda::CUDAStream& stream : streams_) done.block(stream);
  }

  cpu::Communicator& host_;
  const at::Device device_;
  const at::cuda::CUDAStream stream_;
  const cpu::Config config_;
  std::vector<at::cuda::CUDAStream> streams_;  // [world]
  std::optional<LocalGroup> group_;            // rank 0's
};

// Where a rank is: which process, which GPU.
struct Place {
  char process[33];
  char gpu[16];
};

Place place_of(at::Device device) {
  static const std::string process = cpu::random_token();
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device.index()), "asking which GPU this is");
  Place place{};
  std::copy_n(process.begin(), 32, place.process);
  std::copy_n(properties.uuid.bytes, 16, place.gpu);
  return place;
}

}  // namespace

std::unique_ptr<Device> make_device(cpu::Communicator& host, const cpu::Config& config, at::Device where) {
  const c10::cuda::CUDAGuard on(where);
  // The first call may be within a capture, of which this is to be no part.
  const c10::cuda::CUDAStreamCaptureModeGuard anything(cudaStreamCaptureModeRelaxed);
  at::cuda::CUDAStream stream = at::cuda::getStreamFromPool(/*isHighPriority=*/false, where.index());
  for (int i = 0; i < 32 && is_capturing(stream.stream()); ++i) {  // the pool goes round, and captures take from it
    stream = at::cuda::getStreamFromPool(/*isHighPriority=*/false, where.index());
  }
  const c10::cuda::CUDAStreamGuard aside(stream);
  Place mine{};
  const std::string unknown = agree(host, [&] { mine = place_of(where); });
  if (!unknown.empty()) throw_unsupported("these ranks' GPUs cannot communicate: " + unknown);
  const std::vector<Place> places = gather(host, mine);
  std::set<std::string> processes, gpus;
  for (const Place& p : places) {
    processes.emplace(p.process);
    gpus.emplace(p.gpu, sizeof(p.gpu));
  }
  if (host.world() > 1 && processes.size() == 1 && gpus.size() == 1) return std::make_unique<Met>(host, config, where);
  if (gpus.size() < places.size()) return std::make_unique<Stepped>(host, where, "several processes share a GPU");
  auto peers = std::make_unique<PeerGroup>(host, config, where);
  const std::string failure = peers->meet();
  if (failure.empty()) return peers;
  peers.reset();
  return std::make_unique<Stepped>(host, where, "the GPUs do not reach one another (" + failure + ")");
}

}  // namespace pycoll::bindings
