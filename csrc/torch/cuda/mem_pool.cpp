// Memory that peers map, for torch's own allocator: what torch.cuda.use_mem_pool takes.
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>
#include <torch/extension.h>

#include <map>
#include <mutex>

#include "torch/modules.h"

namespace pycoll::bindings {

py::object make_mem_allocator(const std::function<at::Tensor(int64_t)>& allocate) {
  struct Taken {
    std::mutex lock;
    std::map<void*, at::Tensor> memory;
  };
  const auto taken = std::make_shared<Taken>();
  const auto take = [allocate, taken](size_t bytes, int, cudaStream_t) {
    const at::Tensor memory = allocate(static_cast<int64_t>(bytes));
    const std::lock_guard guard(taken->lock);
    return taken->memory.emplace(memory.mutable_data_ptr(), memory).first->first;
  };
  const auto give_back = [taken](void* p, size_t, int, cudaStream_t) {
    const std::lock_guard guard(taken->lock);
    taken->memory.erase(p);
  };
  return py::cast(torch::cuda::CUDAPluggableAllocator::createCustomAllocator(take, give_back));
}

}  // namespace pycoll::bindings
