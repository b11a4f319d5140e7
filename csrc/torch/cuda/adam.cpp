// FusedAdam's tensors on a GPU: the tables that csrc/cuda/adam.h's kernels read, and their launch.
#include "torch/adam.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "core/layout.h"
#include "cuda/adam.h"
#include "torch/cuda/launcher.h"
#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

using cuda_device::Chunk;
using cuda_device::TablePart;

at::Tensor bytes_on(const at::Device& device, size_t size) {
  return at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte).device(device));
}

// Entries and chunks, one after the other, and last the counter of finished blocks, in device memory. Memory of the
// host would have to outlive a captured graph, so there the bytes travel as arguments of kernels.
template <class Entry>
class Table {
 public:
  Table(const std::vector<Entry>& entries, const std::vector<Chunk>& chunks, const at::Device& device,
        cudaStream_t stream)
      : chunks_at_(round_up(entries.size() * sizeof(Entry), alignof(Chunk))),
        counter_at_(chunks_at_ + chunks.size() * sizeof(Chunk)),
        memory_(bytes_on(device, counter_at_ + sizeof(uint32_t))) {
    static_assert(alignof(Chunk) >= alignof(uint32_t));
    const bool captured = is_capturing(stream);
    const at::Tensor host = at::zeros({memory_.numel()}, at::TensorOptions().dtype(at::kByte).pinned_memory(!captured));
    auto* const to = static_cast<std::byte*>(host.mutable_data_ptr());
    if (!entries.empty()) std::memcpy(to, entries.data(), entries.size() * sizeof(Entry));
    if (!chunks.empty()) std::memcpy(to + chunks_at_, chunks.data(), chunks.size() * sizeof(Chunk));
    if (!captured) {
      memory_.copy_(host, /*non_blocking=*/true);
      return;
    }
    for (size_t done = 0; done < host.nbytes(); done += TablePart::kBytes) {
      TablePart part;
      const size_t size = std::min(TablePart::kBytes, host.nbytes() - done);
      std::memcpy(part.bytes, to + done, size);
      check_cuda(cuda_device::launch_store(at(done), part, size, stream), "storing the optimizer's table");
    }
  }
  const Entry* entries() const { return reinterpret_cast<const Entry*>(at(0)); }
  const Chunk* chunks() const { return reinterpret_cast<const Chunk*>(at(chunks_at_)); }
  uint32_t* counter() const { return reinterpret_cast<uint32_t*>(at(counter_at_)); }

 private:
  std::byte* at(size_t offset) const { return static_cast<std::byte*>(memory_.mutable_data_ptr()) + offset; }
  const size_t chunks_at_, counter_at_;
  const at::Tensor memory_;
};

void add_chunks(std::vector<Chunk>& chunks, size_t tensor, size_t count) {
  for (size_t i = 0; i < ceil_div(count, cuda_device::kChunk); ++i) {
    chunks.push_back({static_cast<uint32_t>(tensor), static_cast<uint32_t>(i)});
  }
}

template <class T>
T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

}  // namespace

void adam_on_cuda(const std::vector<AdamTensor>& tensors, const AdamStep& step) {
  const at::Device device = tensors[0].param.device();
  const c10::cuda::CUDAGuard on(device);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  std::vector<cuda_device::AdamTarget> targets;
  std::vector<Chunk> chunks;
  for (const AdamTensor& t : tensors) {
    const auto count = static_cast<size_t>(t.param.numel());
    add_chunks(chunks, targets.size(), count);
    targets.push_back(
        {{pointer<void>(t.param), pointer<void>(t.grad), pointer<float>(t.master), pointer<float>(t.exp_avg),
          pointer<float>(t.exp_avg_sq), pointer<float>(t.max_exp_avg_sq), count, t.first, step.stochastic},
         pointer<float>(t.step),
         t.dtype(),
         t.grad_dtype()});
  }
  const Table table(targets, chunks, device, stream);
  check_cuda(cuda_device::launch_adam({table.entries(), table.chunks(), static_cast<uint32_t>(targets.size()),
                                       static_cast<uint32_t>(chunks.size()), table.counter(), step.settings,
                                       kRoundingSeed, pointer<float>(step.lr), pointer<float>(step.grad_scale),
                                       pointer<float>(step.clip), pointer<float>(step.found_inf)},
                                      stream),
             "launching a step of Adam");
}

at::Tensor sum_of_squares_on_cuda(const std::vector<at::Tensor>& grads) {
  const at::Device device = grads[0].device();
  const c10::cuda::CUDAGuard on(device);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  std::vector<cuda_device::SquaresSource> sources;
  std::vector<Chunk> chunks;
  for (const at::Tensor& grad : grads) {
    add_chunks(chunks, sources.size(), grad.numel());
    sources.push_back({grad.const_data_ptr(), static_cast<size_t>(grad.numel()), *float_dtype(grad)});
  }
  const auto doubles = at::TensorOptions().dtype(at::kDouble).device(device);
  if (chunks.empty()) return at::zeros({}, doubles);
  const at::Tensor sum = at::empty({}, doubles);
  const at::Tensor partial = at::empty({static_cast<int64_t>(chunks.size())}, doubles);
  const Table table(sources, chunks, device, stream);
  check_cuda(cuda_device::launch_squares({table.entries(), table.chunks(), static_cast<uint32_t>(chunks.size()),
                                          table.counter(), pointer<double>(partial), pointer<double>(sum)},
                                         stream),
             "launching the norm of gradients");
  return sum;
}

at::Tensor clip_on_cuda(const at::Tensor& sums, const at::Tensor& scale, double max_norm) {
  const c10::cuda::CUDAGuard on(sums.device());
  const at::Tensor result = at::empty({3}, sums.options().dtype(at::kFloat));
  check_cuda(cuda_device::launch_clip({pointer<double>(sums), static_cast<int>(sums.numel()), pointer<float>(scale),
                                       max_norm, pointer<float>(result)},
                                      at::cuda::getCurrentCUDAStream().stream()),
             "launching the clipping of gradients");
  return result;
}

}  // namespace pycoll::bindings
