// FusedAdam's tensors on a GPU: the tables that csrc/cuda/adam.h's kernels read, and their launch.
#include "torch/adam.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include "cuda/adam.h"
#include "torch/cuda/table.h"

namespace pycoll::bindings {

using cuda_device::Chunk;

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
