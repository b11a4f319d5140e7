// core/combine.h and cpu/kernels.h: every dtype, op, instruction set, number of sources and destinations, in place and
// misaligned, against an oracle of higher precision; all instruction sets and the strided loop give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "cpu/kernels.h"

using namespace pycoll;
using cpu::Kernels;

namespace {

using Combine = std::function<void(const CombineArgs&)>;

struct Problem {
  ReduceOp op;
  int sources, destinations;
  uint32_t wire;
  bool final, in_place;
  size_t count, shift;
  int world;
};

template <class S>
S at(const Bytes& bytes, size_t i) {
  S value;
  std::memcpy(&value, bytes.data() + i * sizeof(S), sizeof(S));
  return value;
}

template <class T>
bool is_wire(const Problem& p, int k) {
  return kWidens<T> && (p.wire >> k & 1) != 0;
}

std::mt19937 generator(7);

// Products stay near one; sums mix magnitudes and signs, so that their order and rounding matter. Integers take all
// bits, so that they wrap.
template <class S>
S random_value(ReduceOp op) {
  if constexpr (std::is_integral_v<S>) {
    return static_cast<S>((static_cast<uint64_t>(generator()) << 32) | generator());
  } else {
    const double fraction = generator() / 4294967296.0;
    const double sign = generator() % 2 ? 1 : -1;
    const double x = op == ReduceOp::kProduct ? 0.7 + 0.7 * fraction
                                              : std::ldexp(0.5 + fraction, static_cast<int>(generator() % 12) - 6);
    if constexpr (kWidens<S>) return S::from_float(static_cast<float>(sign * x));
    if constexpr (!kWidens<S>) return static_cast<S>(sign * x);
  }
}

template <class S>
Bytes random_bytes(const Problem& p) {
  Bytes bytes(p.count * sizeof(S));
  for (size_t i = 0; i < p.count; ++i) {
    const S value = random_value<S>(p.op);
    std::memcpy(bytes.data() + i * sizeof(S), &value, sizeof(S));
  }
  return bytes;
}

// Runs one implementation on fresh copies of the sources; what the first destination holds afterwards.
template <class T>
Bytes run(const Combine& combine, const Problem& p, const std::vector<Bytes>& sources) {
  const size_t size = p.final ? sizeof(T) : sizeof(Accumulator<T>);
  std::vector<Buffer> in, out;
  for (int k = 0; k < p.sources; ++k) in.emplace_back(sources[k], p.shift * (k + 1));
  out.reserve(p.destinations);
  std::vector<const void*> src;
  std::vector<void*> dst;
  std::vector<bool> overwritten(p.sources);
  for (Buffer& b : in) src.push_back(b.data());
  for (int d = 0; d < p.destinations; ++d) {
    const int same = p.sources - 1 - d;  // the last source is the first destination
    if (p.in_place && same >= 0 && sources[same].size() == p.count * size) {
      overwritten[same] = true;
      dst.push_back(in[same].data());
    } else {
      dst.push_back(out.emplace_back(p.count * size, p.shift * (d + 3)).data());
    }
  }
  combine({dst.data(), p.destinations, src.data(), p.sources, p.wire, p.final, p.world, p.count});
  const auto* const result = static_cast<const std::byte*>(dst[0]);
  for (void* d : dst) CHECK(p.count == 0 || std::memcmp(d, result, p.count * size) == 0);
  for (int k = 0; k < p.sources; ++k) CHECK(overwritten[k] || in[k].content() == sources[k]);
  for (const Buffer& b : in) CHECK(b.guards_intact());
  for (const Buffer& b : out) CHECK(b.guards_intact());
  return Bytes(result, result + p.count * size);
}

// Half the distance between neighbours near x, in a format of `digits` significant bits whose smallest number is
// 2^least.
long double half_ulp(long double x, int digits, int least) {
  const int exponent = x == 0 ? least : std::max(std::ilogb(x) - (digits - 1), least);
  return std::ldexp(0.5L, exponent);
}

template <class R>
long double half_ulp_as(long double x) {
  if constexpr (std::is_same_v<R, Float16>) return half_ulp(x, 11, -24);
  if constexpr (std::is_same_v<R, BFloat16>) return half_ulp(x, 8, -133);
  if constexpr (std::is_floating_point_v<R>) {
    using Limits = std::numeric_limits<R>;
    return half_ulp(x, Limits::digits, Limits::min_exponent - Limits::digits);
  }
}

// 0.5 ulp of the result + (W-1) u sum|x| where u is half an ulp of 1 in the accumulator; exact for minimum and maximum.
template <class A, class R>
bool within_bound(ReduceOp op, const std::vector<A>& x, int divisor, R result) {
  long double exact = x[0], magnitude = std::fabs(exact);
  for (size_t k = 1; k < x.size(); ++k) {
    const long double v = x[k];
    if (op == ReduceOp::kMin) exact = std::min(exact, v);
    if (op == ReduceOp::kMax) exact = std::max(exact, v);
    if (op == ReduceOp::kProduct) exact *= v;
    if (op == ReduceOp::kSum || op == ReduceOp::kAvg) exact += v;
    magnitude += std::fabs(v);
  }
  if (op == ReduceOp::kProduct) magnitude = std::fabs(exact);
  if (op == ReduceOp::kMin || op == ReduceOp::kMax) magnitude = 0;
  const int roundings = static_cast<int>(x.size()) - 1 + (divisor > 1);  // the division is one
  const long double unit = std::ldexp(1.0L, -std::numeric_limits<A>::digits);
  exact /= divisor;
  return std::fabs(widen(result) - exact) <= half_ulp_as<R>(exact) + roundings * unit * magnitude / divisor * 1.0001L;
}

template <class A>
A integer_oracle(ReduceOp op, const std::vector<A>& x, int divisor) {
  A result = x[0];
  for (size_t k = 1; k < x.size(); ++k) {
    const auto a = static_cast<uint64_t>(result), b = static_cast<uint64_t>(x[k]);
    if (op == ReduceOp::kMin || op == ReduceOp::kMax) {
      result = (x[k] < result) == (op == ReduceOp::kMin) ? x[k] : result;
    } else {
      result = static_cast<A>(op == ReduceOp::kProduct ? a * b
                              : op == ReduceOp::kBand  ? a & b
                              : op == ReduceOp::kBor   ? a | b
                              : op == ReduceOp::kBxor  ? a ^ b
                                                       : a + b);
    }
  }
  if constexpr (std::is_signed_v<A>) return static_cast<A>(static_cast<int64_t>(result) / divisor);
  return static_cast<A>(result / static_cast<unsigned>(divisor));
}

template <class T, class R>
void check_against_oracle(const Problem& p, const std::vector<Bytes>& sources, const Bytes& result) {
  using A = Accumulator<T>;
  const int divisor = p.op == ReduceOp::kAvg && p.final ? p.world : 1;
  std::vector<A> x(sources.size());
  for (size_t i = 0; i < p.count; ++i) {
    for (size_t k = 0; k < x.size(); ++k) {
      x[k] = is_wire<T>(p, static_cast<int>(k)) ? at<A>(sources[k], i) : widen(at<T>(sources[k], i));
    }
    if constexpr (std::is_integral_v<A>) {
      CHECK_EQ(static_cast<int64_t>(at<R>(result, i)), static_cast<int64_t>(integer_oracle(p.op, x, divisor)));
    } else {
      CHECK(within_bound(p.op, x, divisor, at<R>(result, i)));
    }
  }
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> all;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (const Kernels* k = cpu::kernels_for(isa)) all.push_back(k);
  }
  return all;
}

struct FakeGroup {
  size_t index, count;
  size_t thread() const { return index; }
  size_t size() const { return count; }
};

template <class T>
void strided(const CombineArgs& a, ReduceOp op) {
  for (size_t t = 0; t < 3; ++t) {
    const FakeGroup g{t, 3};
    dispatch_op<T>(op, [&](auto constant) { combine_strided<T, decltype(constant)::value>(g, a); });
  }
}

template <class T>
void check_problem(DType dtype, const Problem& p) {
  std::vector<Bytes> sources;
  for (int k = 0; k < p.sources; ++k) {
    sources.push_back(is_wire<T>(p, k) ? random_bytes<Accumulator<T>>(p) : random_bytes<T>(p));
  }
  const Bytes expected = run<T>([&](const CombineArgs& a) { strided<T>(a, p.op); }, p, sources);
  if (p.final) {
    check_against_oracle<T, T>(p, sources, expected);
  } else {
    check_against_oracle<T, Accumulator<T>>(p, sources, expected);
  }
  for (const Kernels* k : available()) {
    const auto combine = k->combine[static_cast<int>(dtype)][static_cast<int>(p.op)];
    if (check::failed(run<T>(combine, p, sources) == expected)) {
      std::fprintf(
          stderr, "%s %s %s: %d sources (wire %x), %d destinations, final %d, in place %d, count %zu, shift %zu\n",
          k->isa, name(dtype), name(p.op), p.sources, p.wire, p.destinations, p.final, p.in_place, p.count, p.shift);
    }
  }
}

// The short ones: everything with everything, but for one or two destinations by turns.
template <class T>
void check_short(DType dtype, Problem p) {
  for (const size_t count : {size_t{0}, size_t{1}, size_t{37}}) {
    for (const size_t shift : {size_t{0}, size_t{1}, sizeof(T)}) {
      for (const bool final : {false, true}) {
        for (const bool in_place : {false, true}) {
          const int destinations = 1 + static_cast<int>(generator() % 2);
          check_problem<T>(dtype, {p.op, p.sources, destinations, p.wire, final, in_place, count, shift, p.world});
        }
      }
    }
  }
}

// The long ones, of several blocks and a tail, take turns in the rest too.
template <class T>
void check_long(DType dtype, Problem p) {
  p.count = 5000;
  for (const bool final : {false, true}) {
    p.final = final;
    p.in_place = generator() % 2 != 0;
    p.destinations = 1 + static_cast<int>(generator() % 2);
    p.shift = generator() % 2;
    check_problem<T>(dtype, p);
  }
}

template <class T>
void check_dtype(DType dtype) {
  for (int op = 0; op < kReduceOpCount; ++op) {
    if (of_bits(static_cast<ReduceOp>(op)) && !std::is_integral_v<T>) continue;
    for (const int sources : {1, 2, 3, 5, 9}) {
      const uint32_t all = (1u << sources) - 1;
      for (const uint32_t wire : {0u, all >> 1, all, 0x55u & all}) {
        if (!kWidens<T> && wire != 0 && wire != all)
          continue;  // means nothing to them: once without and once with is enough
        const Problem p{static_cast<ReduceOp>(op), sources, 1, wire, true, false, 0, 0, 7};
        check_short<T>(dtype, p);
        check_long<T>(dtype, p);
      }
    }
  }
}

}  // namespace

int main() {
  for (int d = 0; d < kDTypeCount; ++d) {
    const auto dtype = static_cast<DType>(d);
    dispatch_dtype(dtype, [&](auto tag) { check_dtype<typename decltype(tag)::type>(dtype); });
  }
  return check::report();
}
