// The reduction operations, on accumulators.
//
// Integers wrap on overflow, as torch's do. Minimum and maximum of a NaN and anything is NaN, as torch.minimum's and
// torch.maximum's; of two equal values (zeros of different sign) the second is taken. An average is the sum, divided
// once by the world size, before rounding: true division for floats, in fp32 for the 16-bit ones; for integers the
// (wrapped) sum is divided and truncated toward zero. Bits (band, bor, bxor) are those of integers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/platform.h"

namespace pycoll {

enum class ReduceOp : uint8_t { kSum, kAvg, kMin, kMax, kProduct, kBand, kBor, kBxor };
constexpr int kReduceOpCount = 8;

constexpr const char* name(ReduceOp op) {
  constexpr const char* kNames[kReduceOpCount] = {"sum", "avg", "min", "max", "product", "band", "bor", "bxor"};
  return kNames[static_cast<int>(op)];
}

constexpr bool of_bits(ReduceOp op) { return op == ReduceOp::kBand || op == ReduceOp::kBor || op == ReduceOp::kBxor; }
template <class T, ReduceOp Op>
constexpr bool kReduces = std::is_integral_v<T> || !of_bits(Op);

// f(the operation as a constant), for elements of T. Not for bits of floats, which nobody may ask for.
template <class T, class F>
constexpr decltype(auto) dispatch_op(ReduceOp op, F&& f) {
  using enum ReduceOp;
  if constexpr (std::is_integral_v<T>) {
    if (op == kBand) return f(std::integral_constant<ReduceOp, kBand>{});
    if (op == kBor) return f(std::integral_constant<ReduceOp, kBor>{});
    if (op == kBxor) return f(std::integral_constant<ReduceOp, kBxor>{});
  }
  switch (op) {
    case kSum:
      return f(std::integral_constant<ReduceOp, kSum>{});
    case kAvg:
      return f(std::integral_constant<ReduceOp, kAvg>{});
    case kMin:
      return f(std::integral_constant<ReduceOp, kMin>{});
    case kMax:
      return f(std::integral_constant<ReduceOp, kMax>{});
    default:
      return f(std::integral_constant<ReduceOp, kProduct>{});
  }
}

template <ReduceOp Op>
struct Reduce {
  template <class A>
  PYCOLL_HD A operator()(A a, A b) const {
    if constexpr (Op == ReduceOp::kMin) {
      return ((a < b) | (a != a)) ? a : b;
    } else if constexpr (Op == ReduceOp::kMax) {
      return ((a > b) | (a != a)) ? a : b;
    } else if constexpr (Op == ReduceOp::kBand) {
      return static_cast<A>(a & b);
    } else if constexpr (Op == ReduceOp::kBor) {
      return static_cast<A>(a | b);
    } else if constexpr (Op == ReduceOp::kBxor) {
      return static_cast<A>(a ^ b);
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
