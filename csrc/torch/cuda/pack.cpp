// Gradient buckets on a GPU: the tables that csrc/cuda/pack.h's kernels read, and their launch.
#include "cuda/pack.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include "torch/adam.h"
#include "torch/bucket.h"
#include "torch/cuda/table.h"

namespace pycoll::bindings {

void pack_on_cuda(const std::vector<Packed>& gradients, Wire wire, const at::Tensor& memory, const at::Tensor& residual,
                  const at::Tensor& factor, const at::Tensor& found_inf) {
  const at::Device device = memory.device();
  const c10::cuda::CUDAGuard on(device);
  const cudaStream_t stream = at::cuda::getCurrentCUDAStream().stream();
  std::vector<cuda_device::PackSource> sources;
  std::vector<cuda_device::Chunk> chunks;
  for (const Packed& g : gradients) {
    add_chunks(chunks, sources.size(), g.count);
    sources.push_back(g.grad.defined()
                          ? cuda_device::PackSource{g.grad.const_data_ptr(), g.first, g.count, *float_dtype(g.grad)}
                          : cuda_device::PackSource{nullptr, g.first, g.count, DType::kFloat32});
  }
  if (chunks.empty() && !found_inf.defined()) return;
  const Table table(sources, chunks, device, stream);
  check_cuda(cuda_device::launch_pack({table.entries(), table.chunks(), static_cast<uint32_t>(chunks.size()),
                                       table.counter(0), table.counter(1), wire, pointer<void>(memory),
                                       pointer<float>(residual), pointer<float>(factor), pointer<float>(found_inf)},
                                      stream),
             "launching the packing of gradients");
}

void average_on_cuda(const at::Tensor& wires, int world, const at::Tensor& to) {
  const c10::cuda::CUDAGuard on(to.device());
  check_cuda(cuda_device::launch_average({static_cast<const Int8Unit*>(wires.const_data_ptr()), world,
                                          static_cast<size_t>(to.numel()) / kUnit, pointer<float>(to)},
                                         at::cuda::getCurrentCUDAStream().stream()),
             "launching the average of gradients");
}

}  // namespace pycoll::bindings
