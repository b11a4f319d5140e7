// The tables of cuda/chunks.h on a GPU, for a launch on the current stream.
#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/layout.h"
#include "cuda/chunks.h"
#include "torch/cuda/launcher.h"
#include "torch/errors.h"

namespace pycoll::bindings {

inline at::Tensor bytes_on(const at::Device& device, size_t size) {
  return at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte).device(device));
}

// Entries and chunks, one after the other, and last `kCounters` counters, zero before the launch, in device memory. Memory
// of the host would have to outlive a captured graph, so there the bytes travel as arguments of kernels.
template <class Entry>
class Table {
 public:
  Table(const std::vector<Entry>& entries, const std::vector<cuda_device::Chunk>& chunks, const at::Device& device,
        cudaStream_t stream)
      : chunks_at_(round_up(entries.size() * sizeof(Entry), alignof(cuda_device::Chunk))),
        counter_at_(chunks_at_ + chunks.size() * sizeof(cuda_device::Chunk)),
        memory_(bytes_on(device, counter_at_ + kCounters * sizeof(uint32_t))) {
    static_assert(alignof(cuda_device::Chunk) >= alignof(uint32_t));
    const bool captured = is_capturing(stream);
    const at::Tensor host = at::zeros({memory_.numel()}, at::TensorOptions().dtype(at::kByte).pinned_memory(!captured));
    auto* const to = static_cast<std::byte*>(host.mutable_data_ptr());
    if (!entries.empty()) std::memcpy(to, entries.data(), entries.size() * sizeof(Entry));
    if (!chunks.empty()) std::memcpy(to + chunks_at_, chunks.data(), chunks.size() * sizeof(cuda_device::Chunk));
    if (!captured) {
      memory_.copy_(host, /*non_blocking=*/true);
      return;
    }
    for (size_t done = 0; done < host.nbytes(); done += cuda_device::TablePart::kBytes) {
      cuda_device::TablePart part;
      const size_t size = std::min(cuda_device::TablePart::kBytes, host.nbytes() - done);
      std::memcpy(part.bytes, to + done, size);
      check_cuda(cuda_device::launch_store(at(done), part, size, stream), "storing a table of tensors");
    }
  }
  const Entry* entries() const { return reinterpret_cast<const Entry*>(at(0)); }
  const cuda_device::Chunk* chunks() const { return reinterpret_cast<const cuda_device::Chunk*>(at(chunks_at_)); }
  uint32_t* counter(int k = 0) const { return reinterpret_cast<uint32_t*>(at(counter_at_)) + k; }

 private:
  static constexpr size_t kCounters = 2;
  std::byte* at(size_t offset) const { return static_cast<std::byte*>(memory_.mutable_data_ptr()) + offset; }
  const size_t chunks_at_, counter_at_;
  const at::Tensor memory_;
};

inline void add_chunks(std::vector<cuda_device::Chunk>& chunks, size_t tensor, size_t count) {
  for (size_t i = 0; i < ceil_div(count, cuda_device::kChunk); ++i) {
    chunks.push_back({static_cast<uint32_t>(tensor), static_cast<uint32_t>(i)});
  }
}

template <class T>
T* pointer(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

}  // namespace pycoll::bindings
