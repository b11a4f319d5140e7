// Adam and AdamW for one element (Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015; AMSGrad: Reddi et
// al., 2018; decoupled decay: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019), the same bits on
// every device: fp32 arithmetic without fused multiply-adds, and integers where it rounds at random.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/platform.h"

namespace pycoll {

struct AdamSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW: the decay touches the parameter alone; else it is added to the gradient
  bool maximize;
};

// What a step multiplies by and adds, the same for all elements of a tensor.
struct AdamScalars {
  float grad_factor;   // unscaling and clipping in one, negative where the objective is maximized
  float rest1;         // 1 - beta1
  float beta2, rest2;  // rest2: 1 - beta2
  float step_size, eps;
  float l2, decay;  // of the parameter: added to the gradient, taken off the parameter
  uint32_t key[2];  // of the random numbers
};

// sqrt of the device; the host's would set errno, and a loop with it would not vectorize.
PYCOLL_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#elif defined(__clang__)
  return __builtin_elementwise_sqrt(x);
#else
  return __builtin_sqrtf(x);
#endif
}
PYCOLL_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// By squaring: pow() of two devices may differ in the last bit.
PYCOLL_HD double power(double base, uint32_t exponent) {
  double result = 1;
  for (; exponent != 0; exponent >>= 1, base *= base) {
    if ((exponent & 1) != 0) result *= base;
  }
  return result;
}

// A bijection of 32 bits in which each bit of the input reaches all of the output (the constants are those of
// Wellons' hash-prospector, "lowbias32").
PYCOLL_HD uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// 32 random bits for element `index`.
PYCOLL_HD uint32_t random_bits(const uint32_t (&key)[2], uint64_t index) {
  return scramble((scramble(static_cast<uint32_t>(index) + key[0]) ^ static_cast<uint32_t>(index >> 32)) + key[1]);
}

// The scalars of step `step` (from 1), in fp64, each rounded once. `factor`: what gradients are multiplied by; `seed`:
// of the random numbers. The bias corrections are in step_size and eps, so that an element costs one division and one
// root (Kingma & Ba, end of section 2).
PYCOLL_HD AdamScalars adam_scalars(const AdamSettings& a, uint32_t step, double factor, uint32_t seed) {
  const double correction1 = 1 - power(a.beta1, step), correction2 = square_root(1 - power(a.beta2, step));
  AdamScalars s{};
  s.grad_factor = static_cast<float>(a.maximize ? -factor : factor);
  s.rest1 = static_cast<float>(1 - a.beta1);
  s.beta2 = static_cast<float>(a.beta2);
  s.rest2 = static_cast<float>(1 - a.beta2);
  s.step_size = static_cast<float>(a.lr * correction2 / correction1);
  s.eps = static_cast<float>(a.eps * correction2);
  s.l2 = static_cast<float>(a.decoupled ? 0 : a.weight_decay);
  s.decay = static_cast<float>(a.decoupled ? a.lr * a.weight_decay : 0);
  s.key[0] = scramble(seed);
  s.key[1] = scramble(s.key[0] ^ step);
  return s;
}

// Gradients whose squares have `sum`, `scale` times too large, clipped to the norm `max_norm` (Pascanu et al., "On the
// difficulty of training recurrent neural networks", 2013; the 1e-6 is that of torch.nn.utils.clip_grad_norm_).
struct Clipped {
  float norm;       // of the gradients without their scale
  float factor;     // what they are multiplied by as they lie, unscaling included; NaN where the norm is
  float found_inf;  // 1 where the sum is not finite, else 0
};
PYCOLL_HD Clipped clip_to_norm(double sum, double scale, double max_norm) {
  const double norm = square_root(sum) / scale, factor = max_norm / (norm + 1e-6);
  return {static_cast<float>(norm), static_cast<float>((factor > 1 ? 1 : factor) / scale),
          sum - sum == 0 ? 0.0f : 1.0f};
}

// What an element has besides its parameter. max_exp_avg_sq only where kAmsgrad.
struct AdamMoments {
  float exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// The parameter's new value, and the new moments.
template <bool kAmsgrad>
PYCOLL_HD float adam_update(const AdamScalars& s, float param, float grad, AdamMoments& moments) {
  // A decay of zero leaves infinities alone.
  const float l2 = s.l2 != 0 ? s.l2 * param : 0, decay = s.decay != 0 ? s.decay * param : 0;
  const float g = grad * s.grad_factor + l2;
  moments.exp_avg += s.rest1 * (g - moments.exp_avg);
  moments.exp_avg_sq = s.beta2 * moments.exp_avg_sq + s.rest2 * (g * g);
  float second = moments.exp_avg_sq;
  if constexpr (kAmsgrad) {
    const float old = moments.max_exp_avg_sq;
    second = moments.max_exp_avg_sq = ((old > second) | (old != old)) ? old : second;
  }
  return param - (decay + s.step_size * moments.exp_avg / (square_root(second) + s.eps));
}

// Up or down to a neighbour, up with the probability of how near that is (to 2^-16 of the step between the two), by 16
// of the `random` bits. Infinities and NaNs become what T::from_float makes of them.
template <class T>
PYCOLL_HD T round_at_random(float value, uint32_t random);

template <>
PYCOLL_HD BFloat16 round_at_random<BFloat16>(float value, uint32_t random) {
  const uint32_t x = __builtin_bit_cast(uint32_t, value);
  const uint32_t special = mask_if(static_cast<int32_t>(x & 0x7fffffff) >= 0x7f800000);
  const uint32_t rounded = (x + (random & 0xffff)) >> 16;
  return {static_cast<uint16_t>(blend(special, BFloat16::from_float(value).bits, rounded))};
}

template <>
PYCOLL_HD Float16 round_at_random<Float16>(float value, uint32_t random) {
  const uint32_t x = __builtin_bit_cast(uint32_t, value);
  const uint32_t magnitude = x & 0x7fffffff;
  const int32_t order = static_cast<int32_t>(magnitude);
  // Normal result: 13 bits of mantissa go, as in Float16::from_float. Past the largest number lies infinity.
  uint32_t half = (magnitude + (random & 0x1fff) - (112u << 23)) >> 13;
  half = blend(mask_if(static_cast<int32_t>(half) > 0x7c00), 0x7c00, half);
  // Below 2^-14: whole steps of 2^-24, and the part of one that is left.
  const uint32_t subnormal = mask_if(order < (113 << 23));
  const float steps = __builtin_bit_cast(float, magnitude& subnormal) * 0x1p24f;
  const int32_t whole = static_cast<int32_t>(steps);
  const float part = (steps - static_cast<float>(whole)) * 0x1p16f;
  const uint32_t up = static_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(random & 0xffff)) < part);
  half = blend(subnormal, static_cast<uint32_t>(whole) + up, half);
  half = blend(mask_if(order >= 0x7f800000), Float16::from_float(value).bits & 0x7fff, half);
  return {static_cast<uint16_t>(half | ((x >> 16) & 0x8000))};
}

}  // namespace pycoll
