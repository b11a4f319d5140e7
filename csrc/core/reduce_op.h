// The reduction operations, on accumulators.
//
// Integers wrap on overflow, as torch's do. Minimum and maximum of a NaN and anything is NaN, as torch.minimum's and
// torch.maximum's; of two equal values (zeros of different sign) the second is taken. An average is the sum, divided
// once by the world size, before rounding: true division for floats, in fp32 for the 16-bit ones; for integers the
// (wrapped) sum is divided and truncated toward zero.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/platform.h"

namespace pycoll {

enum class ReduceOp : uint8_t { kSum, kAvg, kMin, kMax, kProduct };
constexpr int kReduceOpCount = 5;

constexpr const char* name(ReduceOp op) {
  constexpr const char* kNames[kReduceOpCount] = {"sum", "avg", "min", "max", "product"};
  return kNames[static_cast<int>(op)];
}

template <ReduceOp Op>
struct Reduce {
  template <class A>
  PYCOLL_HD A operator()(A a, A b) const {
    if constexpr (Op == ReduceOp::kMin) {
      return ((a < b) | (a != a)) ? a : b;
    } else if constexpr (Op == ReduceOp::kMax) {
      return ((a > b) | (a != a)) ? a : b;
    } else {
      using W = typename Wrapping<A>::type;
      if constexpr (Op == ReduceOp::kProduct) return static_cast<A>(static_cast<W>(a) * static_cast<W>(b));
      return static_cast<A>(static_cast<W>(a) + static_cast<W>(b));
    }
  }

  // The last step of a reduction over `world` ranks.
  template <class A>
  PYCOLL_HD A finalize(A a, int world) const {
    if constexpr (Op == ReduceOp::kAvg) {
      using D = std::conditional_t<std::is_floating_point_v<A> || (sizeof(A) > sizeof(int)), A, int>;
      return static_cast<A>(static_cast<D>(a) / static_cast<D>(world));
    }
    return a;
  }

 private:
  // Signed overflow is undefined, unsigned wraps; and what is narrower than int would be promoted to it.
  template <class A, bool kInteger = std::is_integral_v<A>>
  struct Wrapping {
    using type = A;
  };
  template <class A>
  struct Wrapping<A, true> {
    using type = std::conditional_t<(sizeof(A) > sizeof(unsigned)), std::make_unsigned_t<A>, unsigned>;
  };
};

}  // namespace pycoll
