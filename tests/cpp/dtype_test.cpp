// core/dtype.h: the conversions of the 16-bit floats, exhaustively, against arithmetic in fp64.
#include "core/dtype.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "check.h"

using namespace pycoll;

namespace {

struct Format {
  int mantissa, exponent;  // bits stored
  int bias() const { return (1 << (exponent - 1)) - 1; }
  int infinity() const { return ((1 << exponent) - 1) << mantissa; }
};
constexpr Format kFloat16{10, 5}, kBFloat16{7, 8};

uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// What the 16 bits are worth (not for NaN).
double value_of(Format f, uint16_t bits) {
  const int magnitude = bits & 0x7fff, exponent = magnitude >> f.mantissa;
  const int fraction = magnitude & ((1 << f.mantissa) - 1);
  double value = exponent == 0 ? std::ldexp(fraction, 1 - f.bias() - f.mantissa)
                               : std::ldexp(fraction + (1 << f.mantissa), exponent - f.bias() - f.mantissa);
  if (magnitude == f.infinity()) value = HUGE_VAL;
  return bits & 0x8000 ? -value : value;
}

// The bits of the nearest value, ties to even: magnitudes are ordered as their bits are, so the neighbours are found by
// bisection.
uint16_t nearest(Format f, float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  int below = 0, above = f.infinity();
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    (value_of(f, static_cast<uint16_t>(middle)) <= magnitude ? below : above) = middle;
  }
  // What lies above the largest finite value rounds as if the next power of two were there.
  const double top = above == f.infinity() ? std::ldexp(1.0, f.bias() + 1) : value_of(f, static_cast<uint16_t>(above));
  const double down = magnitude - value_of(f, static_cast<uint16_t>(below)), up = top - magnitude;
  const bool take_above = up < down || (up == down && below % 2 == 1);
  return static_cast<uint16_t>((take_above ? above : below) | (std::signbit(x) ? 0x8000 : 0));
}

template <class T>
void check_narrow(Format f, float x) {
  const uint16_t actual = T::from_float(x).bits;
  if (std::isnan(x)) {
    CHECK((actual & 0x7fff) > f.infinity());
    CHECK((actual & (1 << (f.mantissa - 1))) != 0);  // quiet
    CHECK_EQ(actual >> 15, static_cast<int>(bits_of(x) >> 31));
  } else {
    CHECK_EQ(actual, nearest(f, x));
  }
}

template <class T>
void check_every_value(Format f) {
  for (uint32_t b = 0; b < 65536; ++b) {
    const T element{static_cast<uint16_t>(b)};
    const float x = element.to_float();
    if (static_cast<int>(b & 0x7fff) > f.infinity()) {
      CHECK(std::isnan(x));
      CHECK_EQ(bits_of(x) >> 31, b >> 15);
      continue;
    }
    CHECK_EQ(static_cast<double>(x), value_of(f, element.bits));
    CHECK_EQ(std::signbit(x), (b & 0x8000) != 0);
    CHECK_EQ(T::from_float(x).bits, element.bits);
  }
}

// Between each two neighbours: the middle, a tie, and the floats beside it and beside the ends.
template <class T>
void check_every_rounding(Format f) {
  for (int b = 0; b < f.infinity(); ++b) {
    const double low = value_of(f, static_cast<uint16_t>(b));
    const double high =
        b + 1 == f.infinity() ? std::ldexp(1.0, f.bias() + 1) : value_of(f, static_cast<uint16_t>(b + 1));
    for (const double target : {low, (low + high) / 2}) {
      const uint32_t middle = bits_of(static_cast<float>(target));
      for (const uint32_t bits : {middle - 1, middle, middle + 1}) {
        if (bits > 0x7f800000) continue;
        check_narrow<T>(f, float_of(bits));
        check_narrow<T>(f, -float_of(bits));
      }
    }
  }
}

template <class T>
void check_type(Format f) {
  check_every_value<T>(f);
  check_every_rounding<T>(f);
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) check_narrow<T>(f, float_of(static_cast<uint32_t>(random())));
  for (const uint32_t bits : {0x7f800000u, 0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0x7f7fffffu, 1u, 0x007fffffu}) {
    check_narrow<T>(f, float_of(bits));
    check_narrow<T>(f, float_of(bits | 0x80000000));
  }
}

// Keeps the compiler from moving arithmetic over a change of the CPU's mode.
template <class T>
T opaque(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A process may have told its CPU to flush subnormal numbers to zero: the conversions keep them.
void check_flush_to_zero() {
#ifdef __x86_64__
  const unsigned saved = _mm_getcsr();
  for (uint32_t b = 0; b < 65536; ++b) {
    const Float16 half{static_cast<uint16_t>(b)};
    const uint32_t wide = bits_of(half.to_float());
    _mm_setcsr(saved | 0x8040);  // FTZ and DAZ
    const uint32_t wide_flushing = opaque(bits_of(Float16{opaque(half.bits)}.to_float()));
    const uint16_t half_flushing = opaque(Float16::from_float(float_of(opaque(wide))).bits);
    const uint16_t brain_flushing = opaque(BFloat16::from_float(float_of(opaque(b))).bits);  // b as a float: subnormal
    _mm_setcsr(saved);
    CHECK_EQ(wide_flushing, wide);
    CHECK_EQ(half_flushing, Float16::from_float(float_of(wide)).bits);
    CHECK_EQ(brain_flushing, BFloat16::from_float(float_of(b)).bits);
  }
#endif
}

void check_tables() {
  static_assert(size_of(DType::kFloat32) == 4 && size_of(DType::kBFloat16) == 2 && size_of(DType::kUInt8) == 1);
  static_assert(accumulator_size(DType::kFloat16) == 4 && accumulator_size(DType::kInt8) == 1);
  const char* const names[] = {"float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8"};
  for (int d = 0; d < kDTypeCount; ++d) {
    CHECK_EQ(std::string(name(static_cast<DType>(d))), names[d]);
    const size_t size =
        dispatch_dtype(static_cast<DType>(d), [](auto tag) { return sizeof(typename decltype(tag)::type); });
    CHECK_EQ(size, size_of(static_cast<DType>(d)));
  }
}

}  // namespace

int main() {
  check_type<Float16>(kFloat16);
  check_type<BFloat16>(kBFloat16);
  check_flush_to_zero();
  check_tables();
  return check::report();
}
