// Tensors as the core sees them: a dtype and dense memory; what cannot be seen so is copied, or refused with the
// reason.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "cpu/communicator.h"

namespace pycoll::bindings {

// The dtype to reduce in. Throws UnsupportedError.
DType reducible(const at::Tensor& t, const char* collective);

// Copies need no arithmetic: a tensor without a dtype of ours travels as bytes.
struct Elements {
  DType dtype;
  size_t count;
};
Elements elements_to_copy(const at::Tensor& t);

// Throws UnsupportedError unless `t` is a strided CPU tensor.
void check_memory(const at::Tensor& t, const char* collective);
// The same, and that writing to `t` is well defined: no two elements at one address, no gradient behind it.
void check_writable(const at::Tensor& t, const char* collective);

// Throws UsageError if the two (dense) tensors overlap otherwise than in place; `part` allows that one is a block of
// the other.
void check_overlap(const at::Tensor& in, const at::Tensor& out, const char* collective);

// A dense result for `out`: itself where it is dense, else a buffer that finish() copies back.
class Output {
 public:
  explicit Output(const at::Tensor& out, bool keep_content);
  const at::Tensor& dense() const { return dense_; }
  void finish() const;

 private:
  at::Tensor out_, dense_;
};

ReduceOp parse_op(const std::string& op);
std::optional<Algorithm> parse_algorithm(const std::string& algorithm);  // none: "auto"

}  // namespace pycoll::bindings
