// Tensors as the core sees them: a dtype and dense memory; what cannot be seen so is copied, or refused with the
// reason.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "cpu/communicator.h"

namespace pycoll::bindings {

// How to reduce: the operation and, for sums of what is multiplied first, by what (one element; else undefined).
struct Reduction {
  ReduceOp op;
  at::Tensor factor{};
};

struct Elements {
  DType dtype;
  size_t count;
};
// What to reduce, and the operation on it: a bool is a byte of 0 or 1, a complex number two reals, which are only added.
// Throws UnsupportedError.
Elements elements_to_reduce(const at::Tensor& t, const char* collective);
ReduceOp op_for(const at::Tensor& t, ReduceOp op, const char* collective);
// Copies need no arithmetic: a tensor without a dtype of ours travels as bytes.
Elements elements_to_copy(const at::Tensor& t);

// Element type, and sizes where given, as one number that ranks compare.
uint64_t fingerprint(at::ScalarType type, at::IntArrayRef sizes = {});

// Throws UnsupportedError unless `t` is a strided CPU or CUDA tensor.
void check_memory(const at::Tensor& t, const char* collective);
// The same, and that writing to `t` is well defined: no two elements at one address.
void check_writable(const at::Tensor& t, const char* collective);

// Throws UsageError if the two (dense) tensors overlap, but for in place: one is the other, or rank `rank`'s block of it.
void check_overlap(const at::Tensor& in, const at::Tensor& out, int rank, const char* collective);

// Dense memory for a tensor: its own, or a copy, which load() fills from the tensor and store() writes back. Copying is
// part of the collective: it waits for its turn, since earlier ones may still write to the tensor.
class Dense {
 public:
  explicit Dense(const at::Tensor& t) : tensor_(t) {
    if (!t.is_contiguous()) memory_ = at::empty(t.sizes(), t.options());
  }
  // `factor`, if defined: what load() multiplies by.
  Dense(const at::Tensor& t, const at::Tensor& memory, const at::Tensor& factor = {}) : tensor_(t), factor_(factor) {
    if (!memory.is_same(t)) memory_ = memory;
  }
  const at::Tensor& tensor() const { return tensor_; }
  const at::Tensor& memory() const { return is_copy() ? memory_ : tensor_; }
  bool is_copy() const { return memory_.defined(); }
  void load() const {
    if (is_copy()) copy(memory_, tensor_, factor_);
  }
  void store() const {
    if (is_copy()) copy(tensor_, memory_, {});
  }

 private:
  static void copy(const at::Tensor& to, const at::Tensor& from, const at::Tensor& factor);
  at::Tensor tensor_, memory_, factor_;  // the last two, where there are any: references cost time
};

ReduceOp parse_op(const std::string& op);
std::optional<Algorithm> parse_algorithm(const std::string& algorithm);  // none: "auto"

}  // namespace pycoll::bindings
