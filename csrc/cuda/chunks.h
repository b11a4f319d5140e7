// Tensors of any number and size in one launch: cut into chunks, a block each. Both tables lie in device memory.
#pragma once

#include "core/dtype.h"

namespace pycoll::cuda_device {

constexpr size_t kChunk = 16384;  // elements of a block

struct Chunk {
  uint32_t tensor, index;  // elements from index * kChunk on
};

// Bytes by value, for a captured graph to hold.
struct TablePart {
  static constexpr size_t kBytes = 3840;
  std::byte bytes[kBytes];
};

PYCOLL_HD float value_or(const float* scalar, float otherwise) { return scalar != nullptr ? *scalar : otherwise; }

// f(TypeTag<T>{}) for the float dtypes that an optimizer knows.
template <class F>
PYCOLL_HD auto dispatch_float(DType dtype, const F& f) {
  if (dtype == DType::kFloat16) return f(TypeTag<Float16>{});
  if (dtype == DType::kBFloat16) return f(TypeTag<BFloat16>{});
  return f(TypeTag<float>{});
}

// Writes `size` bytes of `part` to device memory. Returns a cudaError_t.
int launch_store(void* to, const TablePart& part, size_t size, void* stream);

}  // namespace pycoll::cuda_device
