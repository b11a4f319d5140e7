// How gradients travel between ranks: as floats of 32 or 16 bits, or as 8-bit integers with a scale for each block.
//
// 8 bits: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022 (blocks, here linear). What rounding takes
// from an element is added to its next gradient: Seide et al., "1-Bit Stochastic Gradient Descent", 2014 (error feedback).
#pragma once

#include "core/dtype.h"

namespace pycoll {

enum class Wire : uint8_t { kFloat32, kFloat16, kBFloat16, kInt8 };
constexpr int kWireCount = 4;

constexpr const char* name(Wire w) {
  constexpr const char* kNames[kWireCount] = {"float32", "float16", "bfloat16", "int8"};
  return kNames[static_cast<int>(w)];
}

constexpr size_t kUnit = 1024;       // elements that travel together; shards are whole units
constexpr size_t kScaleBlock = 256;  // elements that share a scale
constexpr size_t kScales = kUnit / kScaleBlock;

// A unit of 8-bit elements as it lies in memory.
struct Int8Unit {
  int8_t elements[kUnit];
  float scales[kScales];  // what an element of a block is worth; NaN where one of its gradients was not finite
};

constexpr size_t unit_bytes(Wire w) {
  return w == Wire::kInt8 ? sizeof(Int8Unit) : w == Wire::kFloat32 ? kUnit * sizeof(float) : kUnit * sizeof(uint16_t);
}

// Of the elements where they are floats.
constexpr DType dtype_of(Wire w) {
  return w == Wire::kFloat32 ? DType::kFloat32 : w == Wire::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
}

// What a block is multiplied by to lie in -127 to 127, from its largest magnitude; 0 for a block of zeros, or of what is
// so small that the reciprocal of its scale is infinite.
PYCOLL_HD float steps_per_one(float largest) {
  const float steps = 127.0f / largest;
  return largest > 0 && steps <= 3.402823466e38f ? steps : 0.0f;
}

// What an element is worth: a little less than a 127th of the largest magnitude, lest 127 of it overflow.
PYCOLL_HD float worth_of_step(float largest) { return largest / 127.00001f; }

// The nearest integer, ties to even: adding 1.5 * 2^23 leaves no room for a fraction. For magnitudes to 2^22.
PYCOLL_HD int32_t nearest(float x) {
  return __builtin_bit_cast(int32_t, x + 12582912.0f) - __builtin_bit_cast(int32_t, 12582912.0f);
}

}  // namespace pycoll
