#include "torch/tensors.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>

#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    case at::kInt:
      return DType::kInt32;
    case at::kLong:
      return DType::kInt64;
    case at::kByte:
    case at::kBool:
      return DType::kUInt8;
    default:
      return std::nullopt;
  }
}

}  // namespace

ReduceOp op_for(const at::Tensor& t, ReduceOp op, const char* collective) {
  const bool is_bool = t.scalar_type() == at::kBool;
  const bool adds = op == ReduceOp::kSum || op == ReduceOp::kAvg;
  if ((is_bool && op == ReduceOp::kAvg) || (t.is_complex() && !adds) ||
      (of_bits(op) && !at::isIntegralType(t.scalar_type(), /*includeBool=*/true))) {
    throw_unsupported(std::string(collective) + " has no " + name(op) + " of " + c10::toString(t.scalar_type()) +
                      " tensors");
  }
  if (!is_bool) return op;
  return op == ReduceOp::kSum ? ReduceOp::kMax : op == ReduceOp::kProduct ? ReduceOp::kMin : op;
}

Elements elements_to_reduce(const at::Tensor& t, const char* collective) {
  const auto count = static_cast<size_t>(t.numel());
  if (const auto dtype = dtype_of(t.scalar_type())) return {*dtype, count};
  if (t.is_complex()) return {*dtype_of(c10::toRealValueType(t.scalar_type())), 2 * count};
  throw_unsupported(
      std::string(collective) + " cannot reduce " + c10::toString(t.scalar_type()) +
      " tensors: float32, float64, bfloat16, float16, complex ones, int8, int16, int32, int64, uint8 and bool it "
      "can; convert the tensor");
}

Elements elements_to_copy(const at::Tensor& t) {
  if (const auto dtype = dtype_of(t.scalar_type())) return {*dtype, static_cast<size_t>(t.numel())};
  return {DType::kUInt8, static_cast<size_t>(t.numel()) * t.element_size()};
}

uint64_t fingerprint(at::ScalarType type, at::IntArrayRef sizes) {
  uint64_t hash = 14695981039346656037u + static_cast<uint64_t>(type);  // FNV-1a, over 64-bit words
  for (const int64_t n : sizes) hash = (hash ^ static_cast<uint64_t>(n)) * 1099511628211u;
  return hash;
}

void check_memory(const at::Tensor& t, const char* collective) {
  if (!t.defined()) throw_usage(std::string(collective) + " needs a tensor");
  if (!t.device().is_cpu() && !t.device().is_cuda()) {
    throw_unsupported(std::string(collective) + " got a tensor on " + t.device().str() +
                      ": pycoll communicates CPU and CUDA tensors; move it with .cpu()");
  }
  if (t.layout() != at::kStrided || t.is_mkldnn()) {
    throw_unsupported(std::string(collective) + " got a tensor of layout " + c10::str(t.layout()) +
                      ": it needs a strided one; convert it with .to_dense()");
  }
  if (t.is_conj() || t.is_neg())
    throw_unsupported(std::string(collective) +
                      " got a lazily conjugated or negated tensor: call .resolve_conj() or .resolve_neg()");
}

void check_writable(const at::Tensor& t, const char* collective) {
  check_memory(t, collective);
  if (at::has_internal_overlap(t) == at::MemOverlap::Yes) {
    throw_usage(std::string(collective) +
                " would write to an expanded tensor, in which elements share memory: call .clone() first");
  }
}

void check_overlap(const at::Tensor& in, const at::Tensor& out, int rank, const char* collective) {
  const at::Tensor& part = in.nbytes() < out.nbytes() ? in : out;
  const at::Tensor& whole = in.nbytes() < out.nbytes() ? out : in;
  const auto* p = static_cast<const char*>(part.const_data_ptr());
  const auto* w = static_cast<const char*>(whole.const_data_ptr());
  const bool disjoint = p + part.nbytes() <= w || w + whole.nbytes() <= p;
  if (disjoint || p == w + (part.nbytes() < whole.nbytes() ? rank * part.nbytes() : 0)) return;
  throw_usage(
      std::string(collective) +
      ": `out` overlaps the input: give the same tensor, or a separate one (where sizes differ also this rank's "
      "block of the larger)");
}

void Dense::copy(const at::Tensor& to, const at::Tensor& from, const at::Tensor& factor) {
  const at::NoGradGuard no_grad;                     // the values are communicated, not computed
  const c10::InferenceMode mode(to.is_inference());  // the worker thread knows nothing of its caller's mode
  if (factor.defined()) {
    at::mul_out(const_cast<at::Tensor&>(to), from, factor);
  } else {
    to.copy_(from);
  }
}

ReduceOp parse_op(const std::string& op) {
  for (int i = 0; i < kReduceOpCount; ++i) {
    if (op == name(static_cast<ReduceOp>(i))) return static_cast<ReduceOp>(i);
  }
  throw_usage("unknown op '" + op + "': sum, avg, min, max, product, band, bor or bxor");
}

std::optional<Algorithm> parse_algorithm(const std::string& algorithm) {
  if (algorithm == "auto") return std::nullopt;
  for (const Algorithm a : {Algorithm::kOneShot, Algorithm::kTwoShot, Algorithm::kRing, Algorithm::kTree,
                            Algorithm::kOneShotLl, Algorithm::kTwoShotLl, Algorithm::kMultimem}) {
    if (algorithm == name(a)) return a;
  }
  throw_usage("unknown algorithm '" + algorithm +
              "': auto, one_shot, two_shot, ring or tree; on GPUs one_shot_ll, two_shot_ll or multimem as well");
}

}  // namespace pycoll::bindings
