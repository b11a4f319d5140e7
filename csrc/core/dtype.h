// The element types of a collective, the 16-bit floats among them with their conversions, and the types they are
// accumulated in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/platform.h"

namespace pycoll {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kInt16, kInt32, kInt64, kUInt8 };
constexpr int kDTypeCount = 9;

// All ones where the condition holds: selecting by masks keeps branches out, so that loops vectorize at every
// instruction set.
PYCOLL_HD uint32_t mask_if(bool condition) { return -static_cast<uint32_t>(condition); }

PYCOLL_HD uint32_t blend(uint32_t mask, uint32_t where_set, uint32_t where_clear) {
  return (where_set & mask) | (where_clear & ~mask);
}

// The 16-bit floats as they lie in memory. Both convert to float exactly, and from float by rounding to the nearest,
// ties to even; infinities, subnormals and signed zeros are kept. A NaN keeps its sign and as many leading bits of its
// payload as fit, and is made quiet (as the F16C instructions do; only bfloat16 to float is the mere shift that it is
// everywhere). Float arithmetic appears only where operands and results are normal numbers or may as well be zero:
// flush-to-zero modes do not change a bit. Comparisons are signed: SSE2 and AVX2 have no others.
struct BFloat16 {
  uint16_t bits;

  PYCOLL_HD static BFloat16 from_float(float value) {
    const uint32_t x = __builtin_bit_cast(uint32_t, value);
    const uint32_t nan = mask_if(static_cast<int32_t>(x & 0x7fffffff) > 0x7f800000);
    const uint32_t increment = 0x7fff + ((x >> 16) & 1);
    return {static_cast<uint16_t>(((x | (nan & 0x400000)) + (increment & ~nan)) >> 16)};
  }
  PYCOLL_HD float to_float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;

  PYCOLL_HD static Float16 from_float(float value) {
    const uint32_t x = __builtin_bit_cast(uint32_t, value);
    const uint32_t magnitude = x & 0x7fffffff;
    const int32_t order = static_cast<int32_t>(magnitude);
    // Normal result: round off 13 bits of mantissa, and move the exponent's bias from 127 to 15. A carry moves up to
    // infinity as it should.
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Below 2^-14: the last bit of 0.5 + |value| is worth 2^-24, as that of a subnormal half, so the addition rounds at
    // the right place.
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000;
    const uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    uint32_t half = blend(mask_if(order < (113 << 23)), subnormal, normal);
    half = blend(mask_if(order >= (143 << 23)), 0x7c00, half);  // 2^16 and above
    half = blend(mask_if(order > 0x7f800000), nan, half);
    return {static_cast<uint16_t>(half | ((x >> 16) & 0x8000))};
  }
  PYCOLL_HD float to_float() const {
    const int32_t magnitude = bits & 0x7fff;
    const uint32_t shifted = static_cast<uint32_t>(magnitude) << 13;
    const uint32_t subnormal = __builtin_bit_cast(uint32_t, static_cast<float>(magnitude) * 0x1p-24f);
    const uint32_t infinite_or_nan = shifted | 0x7f800000 | (mask_if(magnitude > 0x7c00) & 0x400000);
    uint32_t x = blend(mask_if(magnitude < 0x400), subnormal, shifted + (112u << 23));
    x = blend(mask_if(magnitude >= 0x7c00), infinite_or_nan, x);
    return __builtin_bit_cast(float, x | static_cast<uint32_t>(bits & 0x8000) << 16);
  }
};

// What sums are kept in: 16-bit floats are added as float and rounded once, at the end; everything else in its own
// type.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<Float16> {
  using type = float;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
constexpr bool kWidens = sizeof(Accumulator<T>) > sizeof(T);

template <class T>
PYCOLL_HD Accumulator<T> widen(T element) {
  if constexpr (kWidens<T>) {
    return element.to_float();
  } else {
    return element;
  }
}

template <class T>
PYCOLL_HD T narrow(Accumulator<T> value) {
  if constexpr (kWidens<T>) {
    return T::from_float(value);
  } else {
    return value;
  }
}

template <class T>
struct TypeTag {
  using type = T;
};

// f(TypeTag<T>{}) with the T of `dtype`.
template <class F>
constexpr decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kInt8:
      return f(TypeTag<int8_t>{});
    case DType::kInt16:
      return f(TypeTag<int16_t>{});
    case DType::kInt32:
      return f(TypeTag<int32_t>{});
    case DType::kInt64:
      return f(TypeTag<int64_t>{});
    case DType::kUInt8:
      return f(TypeTag<uint8_t>{});
  }
  __builtin_unreachable();
}

// Bytes of an element.
constexpr size_t size_of(DType dtype) {
  return dispatch_dtype(dtype, [](auto tag) { return sizeof(typename decltype(tag)::type); });
}

// Bytes of what a sum of such elements is kept in.
constexpr size_t accumulator_size(DType dtype) {
  return dispatch_dtype(dtype, [](auto tag) { return sizeof(Accumulator<typename decltype(tag)::type>); });
}

constexpr const char* name(DType dtype) {
  constexpr const char* kNames[kDTypeCount] = {"float32", "float64", "float16", "bfloat16", "int8",
                                               "int16",   "int32",   "int64",   "uint8"};
  return kNames[static_cast<int>(dtype)];
}

}  // namespace pycoll
