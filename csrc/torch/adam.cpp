// pycoll.FusedAdam's native half: lists of tensors, checked, cut into blocks for torch's threads, or handed to CUDA.
#include "torch/adam.h"

#include <torch/extension.h>

#include <algorithm>
#include <numeric>

#include "cpu/adam.h"
#include "cpu/kernels.h"
#include "torch/block_list.h"
#include "torch/errors.h"
#include "torch/modules.h"

namespace pycoll::bindings {

std::optional<DType> float_dtype(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

namespace {

// Throws UnsupportedError unless `t` is a strided tensor of floats, with memory of its own, that CPU or CUDA reads.
void check_floats(const at::Tensor& t, const char* what) {
  const std::string who = std::string("FusedAdam: a ") + what;
  if (t.layout() != at::kStrided || t.is_mkldnn()) {
    throw_unsupported(who + " is sparse (layout " + c10::str(t.layout()) +
                      "): make it dense, for an embedding with sparse=False, else with .to_dense()");
  }
  if (!t.device().is_cpu() && !t.device().is_cuda()) {
    throw_unsupported(who + " is on " + t.device().str() + ": CPU and CUDA it can; move the model there");
  }
#ifndef PYCOLL_WITH_CUDA
  if (t.is_cuda()) throw_unsupported(who + " is on " + t.device().str() + ", but pycoll was built without CUDA");
#endif
  if (!float_dtype(t)) {
    throw_unsupported(who + " is of " + c10::toString(t.scalar_type()) +
                      ": float32, bfloat16 and float16 it can; convert the model");
  }
  if (!t.has_storage()) {
    throw_unsupported(who + " has no memory of its own (a DTensor?): give the optimizer the local tensors");
  }
}

void check_param(const at::Tensor& param) {
  check_floats(param, "parameter");
  if (!param.is_non_overlapping_and_dense()) {
    throw_unsupported("FusedAdam: a parameter of shape " + c10::str(param.sizes()) + " and strides " +
                      c10::str(param.strides()) + " has gaps or overlaps: make it of a .contiguous() tensor");
  }
}

// The gradient in the layout of its parameter.
at::Tensor fitting(const at::Tensor& grad, const at::Tensor& param) {
  check_floats(grad, "gradient");
  if (grad.device() != param.device() || grad.sizes() != param.sizes()) {
    throw_usage("FusedAdam: a gradient of shape " + c10::str(grad.sizes()) + " on " + grad.device().str() +
                " cannot be that of a parameter of shape " + c10::str(param.sizes()) + " on " + param.device().str());
  }
  if (grad.strides() == param.strides() && !grad.is_neg()) return grad;
  return at::empty_strided(param.sizes(), param.strides(), grad.options()).copy_(grad);
}

void check_state(const at::Tensor& state, const at::Tensor& param, const char* name) {
  if (state.scalar_type() == at::kFloat && state.device() == param.device() && state.sizes() == param.sizes() &&
      state.strides() == param.strides() && state.layout() == at::kStrided) {
    return;
  }
  throw_usage(std::string("FusedAdam: the state ") + name + " is " + c10::toString(state.scalar_type()) +
              c10::str(state.sizes()) + " on " + state.device().str() +
              ", but must be float32 in the shape, strides and device of its parameter: " + c10::str(param.sizes()) +
              ", " + c10::str(param.strides()) + " on " + param.device().str() +
              ". Did the model move? Load a state_dict again after that");
}

void check_scalar(const at::Tensor& t, const at::Tensor& param, const char* name) {
  if (t.scalar_type() == at::kFloat && t.numel() == 1 && t.device() == param.device()) return;
  throw_usage(std::string("FusedAdam: ") + name + " must be one float32 on " + param.device().str() + ", not " +
              c10::toString(t.scalar_type()) + c10::str(t.sizes()) + " on " + t.device().str());
}

float value_of(const at::Tensor& scalar, float otherwise) {
  return scalar.defined() ? *scalar.const_data_ptr<float>() : otherwise;
}

std::byte* bytes_at(const at::Tensor& t, size_t index) {
  return static_cast<std::byte*>(t.mutable_data_ptr()) + index * t.element_size();
}
float* floats_at(const at::Tensor& t, size_t index) {
  return t.defined() ? t.mutable_data_ptr<float>() + index : nullptr;
}

void adam_on_cpu(const std::vector<AdamTensor>& tensors, const AdamStep& step) {
  if (value_of(step.found_inf, 0) != 0) return;
  const double factor = static_cast<double>(value_of(step.clip, 1)) / value_of(step.grad_scale, 1);
  std::vector<AdamScalars> scalars;
  for (const AdamTensor& t : tensors) {
    const float made = *t.step.mutable_data_ptr<float>() += 1;
    scalars.push_back(adam_scalars(step.settings, static_cast<uint32_t>(made), factor, kRoundingSeed));
  }
  size_t elements = 0;
  for (const AdamTensor& t : tensors) elements += t.param.numel();
  const bool streams = cpu::is_large_step(elements);
  const BlockList blocks(tensors.size(), [&](size_t k) { return tensors[k].param.numel(); });
  on_torch_threads(blocks.count(), [&](size_t from, size_t to) {
    blocks.for_each(from, to, [&](size_t k, size_t begin, size_t end) {
      const AdamTensor& t = tensors[k];
      void* const param = bytes_at(t.param, begin);
      const void* const grad = bytes_at(t.grad, begin);
      const size_t count = std::min<size_t>(end, t.param.numel()) - begin;
      const cpu::AdamArgs args{param,
                               floats_at(t.master, begin),
                               &param,
                               1,
                               &grad,
                               1,
                               floats_at(t.exp_avg, begin),
                               floats_at(t.exp_avg_sq, begin),
                               floats_at(t.max_exp_avg_sq, begin),
                               count,
                               t.first + begin,
                               step.stochastic,
                               scalars[k],
                               streams};
      cpu::adam_kernels().update[static_cast<int>(t.dtype())][static_cast<int>(t.grad_dtype())](args);
    });
    cpu::kernels().drain();
  });
}

// A sum a block, and those in order: the same bits however many threads there are.
at::Tensor sum_of_squares_on_cpu(const std::vector<at::Tensor>& grads) {
  const BlockList blocks(grads.size(), [&](size_t k) { return grads[k].numel(); });
  std::vector<double> sums(blocks.count());
  on_torch_threads(blocks.count(), [&](size_t from, size_t to) {
    double* sum = &sums[from];
    blocks.for_each(from, to, [&](size_t k, size_t begin, size_t end) {
      const auto measure = cpu::adam_kernels().measure[static_cast<int>(*float_dtype(grads[k]))];
      const size_t size = grads[k].numel();
      for (; begin < end; begin += cpu::kAdamBlock) {
        const void* const block = bytes_at(grads[k], begin);
        *sum++ = measure(nullptr, &block, 1, std::min(cpu::kAdamBlock, size - begin));
      }
    });
  });
  return at::scalar_tensor(std::accumulate(sums.begin(), sums.end(), 0.0), at::kDouble);
}

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

at::Tensor or_undefined(const MaybeTensor& t) { return t ? *t : at::Tensor(); }

// pycoll/_C.pyi and pycoll/optim.py document them.

void adam_step(const Tensors& params, const Tensors& grads, const std::vector<MaybeTensor>& masters,
               const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const std::vector<MaybeTensor>& max_exp_avg_sqs,
               const Tensors& steps, const std::vector<uint64_t>& firsts, const MaybeTensor& lr_tensor, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
               bool stochastic, const MaybeTensor& grad_scale, const MaybeTensor& clip, const MaybeTensor& found_inf) {
  const AdamStep step{{lr, beta1, beta2, eps, weight_decay, decoupled, maximize},
                      or_undefined(lr_tensor),
                      or_undefined(grad_scale),
                      or_undefined(clip),
                      or_undefined(found_inf),
                      stochastic};
  std::vector<AdamTensor> tensors;
  for (size_t k = 0; k < params.size(); ++k) {
    const at::Tensor& param = params[k];
    check_param(param);
    AdamTensor t{param,
                 fitting(grads[k], param),
                 or_undefined(masters.at(k)),
                 exp_avgs[k],
                 exp_avg_sqs[k],
                 or_undefined(max_exp_avg_sqs.at(k)),
                 steps[k],
                 firsts.at(k)};
    if (t.master.defined()) check_state(t.master, param, "master_param");
    check_state(t.exp_avg, param, "exp_avg");
    check_state(t.exp_avg_sq, param, "exp_avg_sq");
    if (t.max_exp_avg_sq.defined()) check_state(t.max_exp_avg_sq, param, "max_exp_avg_sq");
    check_scalar(t.step, param, "step");
    tensors.push_back(std::move(t));
  }
  if (tensors.empty()) return;
  for (const auto& [scalar, name] : {std::pair{step.lr, "lr"},
                                     {step.grad_scale, "grad_scale"},
                                     {step.clip, "clip"},
                                     {step.found_inf, "found_inf"}}) {
    if (scalar.defined()) check_scalar(scalar, params[0], name);
  }
#ifdef PYCOLL_WITH_CUDA
  if (params[0].is_cuda()) {
    adam_on_cuda(tensors, step);
  } else {
    adam_on_cpu(tensors, step);
  }
#else
  adam_on_cpu(tensors, step);
#endif
  for (const at::Tensor& param : params) {
    if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  }
}

at::Tensor sum_of_squares(const Tensors& grads) {
  Tensors dense;
  for (const at::Tensor& grad : grads) {
    check_floats(grad, "gradient");
    dense.push_back(grad.is_non_overlapping_and_dense() ? grad : grad.contiguous());
  }
#ifdef PYCOLL_WITH_CUDA
  if (!dense.empty() && dense[0].is_cuda()) return sum_of_squares_on_cuda(dense);
#endif
  return sum_of_squares_on_cpu(dense);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> clip_to_norm(const at::Tensor& sums, const MaybeTensor& scale,
                                                            double max_norm) {
  const at::Tensor scaled = or_undefined(scale);
  if (scaled.defined()) check_scalar(scaled, sums, "the scale");
  at::Tensor result;
#ifdef PYCOLL_WITH_CUDA
  if (sums.is_cuda()) result = clip_on_cuda(sums, scaled, max_norm);
#endif
  if (!result.defined()) {
    const double* const sum = sums.const_data_ptr<double>();
    const Clipped c =
        pycoll::clip_to_norm(std::accumulate(sum, sum + sums.numel(), 0.0), value_of(scaled, 1), max_norm);
    result = at::tensor({c.norm, c.factor, c.found_inf});
  }
  return {result[0], result[1], result[2]};
}

}  // namespace

DType AdamTensor::dtype() const { return *float_dtype(param); }
DType AdamTensor::grad_dtype() const { return *float_dtype(grad); }

void bind_adam(py::module_& m) {
  m.def("adam_step", &adam_step, py::arg("params"), py::arg("grads"), py::arg("masters"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("steps"), py::arg("firsts"), py::arg("lr_tensor"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
        py::arg("decoupled"), py::arg("maximize"), py::arg("stochastic"), py::arg("grad_scale"), py::arg("clip"),
        py::arg("found_inf"), py::call_guard<py::gil_scoped_release>());
  m.def("is_large_step", &cpu::is_large_step, py::arg("elements"));
  m.def("sum_of_squares", &sum_of_squares, py::arg("grads"), py::call_guard<py::gil_scoped_release>());
  m.def("clip_to_norm", &clip_to_norm, py::arg("sums"), py::arg("scale"), py::arg("max_norm"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace pycoll::bindings
