// A step of FusedAdam as the devices take it: tensors that fit together, and numbers that may lie on the device.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/adam_math.h"
#include "core/dtype.h"

namespace pycoll::bindings {

// float32 and the 16-bit floats.
std::optional<DType> float_dtype(const at::Tensor& t);

// A parameter that has a gradient: dense memory of the same strides on one device.
struct AdamTensor {
  at::Tensor param, grad;
  at::Tensor master;               // fp32; undefined: none
  at::Tensor exp_avg, exp_avg_sq;  // fp32
  at::Tensor max_exp_avg_sq;       // fp32; undefined: no AMSGrad
  at::Tensor step;                 // one float: steps made
  uint64_t first;                  // index of the first element among those of all parameters
  DType dtype() const;
  DType grad_dtype() const;
};

// For all tensors of a call. One-element tensors of the tensors' device; undefined where they do not apply.
struct AdamStep {
  AdamSettings settings;
  at::Tensor lr;          // float: overrides settings.lr. CUDA alone
  at::Tensor grad_scale;  // float: what gradients are divided by
  at::Tensor clip;        // float: what they are multiplied by
  at::Tensor found_inf;   // float: not 0: nothing is done
  bool stochastic;        // rounding of 16-bit parameters
};

// Of the random numbers of stochastic rounding: the same on all ranks, which must round alike.
constexpr uint32_t kRoundingSeed = 0;

#ifdef PYCOLL_WITH_CUDA
void adam_on_cuda(const std::vector<AdamTensor>& tensors, const AdamStep& step);
// One fp64: the sum of all squares.
at::Tensor sum_of_squares_on_cuda(const std::vector<at::Tensor>& grads);
// Three floats: norm, factor, found_inf (core/adam_math.h). `sums`: fp64; `scale`: float, or undefined.
at::Tensor clip_on_cuda(const at::Tensor& sums, const at::Tensor& scale, double max_norm);
#endif

}  // namespace pycoll::bindings
