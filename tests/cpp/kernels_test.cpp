// cpu/kernels.h: what is easily got wrong (NaN, infinities, overflow, signed zeros, the F16C conversions), copies, and
// the choice of the instruction set.
#include "cpu/kernels.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"

using namespace pycoll;
using cpu::Kernels;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class F>
void for_each_isa(const F& f) {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (const Kernels* k = cpu::kernels_for(isa)) f(*k);
  }
}

// One element from each of the sources, in the middle of a vector, and what comes out; `dtype` is T's.
template <class T>
T reduced(const Kernels& kernels, DType dtype, ReduceOp op, const std::vector<T>& x) {
  constexpr size_t kCount = 70, kPlace = 40;
  std::vector<std::vector<T>> sources;
  std::vector<const void*> src;
  for (const T& value : x) {
    sources.emplace_back(kCount, narrow<T>(1)).at(kPlace) = value;
    src.push_back(sources.back().data());
  }
  std::vector<T> result(kCount);
  void* dst = result.data();
  const auto combine = kernels.combine[static_cast<int>(dtype)][static_cast<int>(op)];
  combine({&dst, 1, src.data(), static_cast<int>(x.size()), 0, true, static_cast<int>(x.size()), kCount});
  return result[kPlace];
}

template <class T>
void check_floats(const Kernels& k, DType dtype) {
  const auto reduce = [&](ReduceOp op, float a, float b) {
    return static_cast<double>(widen(reduced<T>(k, dtype, op, {narrow<T>(a), narrow<T>(b)})));
  };
  for (int op = 0; op < kReduceOpCount; ++op) {
    if (of_bits(static_cast<ReduceOp>(op))) continue;
    for (const float other : {0.0f, -1.0f, kInfinity, -kInfinity, kNaN}) {
      CHECK(std::isnan(reduce(static_cast<ReduceOp>(op), kNaN, other)));
      CHECK(std::isnan(reduce(static_cast<ReduceOp>(op), other, kNaN)));
    }
  }
  CHECK(std::isnan(reduce(ReduceOp::kSum, kInfinity, -kInfinity)));
  CHECK(std::isnan(reduce(ReduceOp::kProduct, kInfinity, 0)));
  CHECK_EQ(reduce(ReduceOp::kAvg, kInfinity, 1), kInfinity);
  CHECK_EQ(reduce(ReduceOp::kMin, -kInfinity, 1), -kInfinity);
  CHECK_EQ(reduce(ReduceOp::kMax, -kInfinity, 1), 1.0);
  CHECK(!std::signbit(reduce(ReduceOp::kMin, -0.0f, 0.0f)));  // of equals the second
  CHECK(std::signbit(reduce(ReduceOp::kMax, 0.0f, -0.0f)));
  CHECK_EQ(widen(reduced<T>(k, dtype, ReduceOp::kSum, std::vector<T>(9, narrow<T>(1)))), 9);
}

// The average divides before it rounds: a sum beyond the range of the elements does no harm, and nothing is rounded
// twice.
void check_average(const Kernels& k) {
  const Float16 most{0x7bff};  // 65504
  CHECK_EQ(reduced<Float16>(k, DType::kFloat16, ReduceOp::kSum, {most, most}).bits, 0x7c00);
  CHECK_EQ(reduced<Float16>(k, DType::kFloat16, ReduceOp::kAvg, {most, most}).bits, most.bits);
  const std::vector<BFloat16> thirds{narrow<BFloat16>(1), narrow<BFloat16>(0), narrow<BFloat16>(0)};
  CHECK_EQ(reduced<BFloat16>(k, DType::kBFloat16, ReduceOp::kAvg, thirds).bits, narrow<BFloat16>(1.0f / 3).bits);
  // A division, not a product with the rounded reciprocal: 49 times 1/7 is a little above 7.
  CHECK_EQ(reduced<float>(k, DType::kFloat32, ReduceOp::kAvg, std::vector<float>(7, 7.0f)), 7.0f);
}

void check_integers(const Kernels& k) {
  CHECK_EQ(reduced<int8_t>(k, DType::kInt8, ReduceOp::kSum, {100, 100}), int8_t{-56});
  CHECK_EQ(reduced<int8_t>(k, DType::kInt8, ReduceOp::kAvg, {100, 100}), int8_t{-28});  // of the wrapped sum
  CHECK_EQ(reduced<int16_t>(k, DType::kInt16, ReduceOp::kProduct, {-1, -32768}), int16_t{-32768});
  CHECK_EQ(reduced<uint8_t>(k, DType::kUInt8, ReduceOp::kAvg, {255, 0}), uint8_t{127});
  CHECK_EQ(reduced<int32_t>(k, DType::kInt32, ReduceOp::kAvg, {-3, 0}), -1);  // toward zero
  const int64_t least = std::numeric_limits<int64_t>::min();
  CHECK_EQ(reduced<int64_t>(k, DType::kInt64, ReduceOp::kSum, {least, -1}), std::numeric_limits<int64_t>::max());
  CHECK_EQ(reduced<int64_t>(k, DType::kInt64, ReduceOp::kMin, {least, 5}), least);
}

// Casts of all 16-bit values and of the floats around them, the way a kernel makes them, beside core/dtype.h's (which
// dtype_test proves).
template <class T>
void check_casts(const Kernels& k, DType dtype) {
  std::vector<T> narrow_in(65536), narrow_out;
  for (size_t b = 0; b < narrow_in.size(); ++b) narrow_in[b].bits = static_cast<uint16_t>(b);
  std::vector<float> wide(narrow_in.size()), floats;
  const auto cast = k.combine[static_cast<int>(dtype)][static_cast<int>(ReduceOp::kSum)];
  void* dst = wide.data();
  const void* src = narrow_in.data();
  cast({&dst, 1, &src, 1, 0, false, 1, wide.size()});
  for (size_t b = 0; b < wide.size(); ++b) {
    const auto bits = __builtin_bit_cast(uint32_t, wide[b]);
    CHECK_EQ(bits, __builtin_bit_cast(uint32_t, narrow_in[b].to_float()));
    // The value itself, its neighbours, the middle to the next one, and that one's neighbours.
    const uint32_t half_step = dtype == DType::kFloat16 ? 0x1000 : 0x8000;
    for (const uint32_t step : {0u, 1u, ~0u, half_step, half_step + 1, half_step - 1}) {
      floats.push_back(__builtin_bit_cast(float, bits + step));
    }
  }
  narrow_out.resize(floats.size());
  dst = narrow_out.data();
  src = floats.data();
  cast({&dst, 1, &src, 1, 1, true, 1, floats.size()});
  for (size_t i = 0; i < floats.size(); ++i) CHECK_EQ(narrow_out[i].bits, T::from_float(floats[i]).bits);
}

void check_copy(const Kernels& k) {
  for (const size_t bytes : {0, 1, 63, 64, 65, 255, 256, 257, 1000, 4096, 16383, 16384, 16385, 100000}) {
    for (const size_t shift : {0, 1, 8}) {
      for (const size_t other_shift : {0, 3}) {
        Bytes content(bytes);
        for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<std::byte>(i * 7 + bytes);
        for (const auto move : {k.copy, k.stream}) {
          Buffer from(content, other_shift), to(bytes, shift);
          move(to.data(), from.data(), bytes);
          CHECK(to.content() == content);
          CHECK(to.guards_intact() && from.guards_intact());
        }
      }
    }
  }
  for (const auto move : {k.copy, k.stream}) move(nullptr, nullptr, 0);
  void* nowhere = nullptr;
  const void* nothing = nullptr;
  k.combine[0][0]({&nowhere, 1, &nothing, 1, 0, true, 1, 0});
}

// In a child process, since the choice is made once: what `PYCOLL_SIMD` leads to.
template <class F>
bool in_child(const char* simd, const F& holds) {
  const pid_t child = fork();
  if (child == 0) {
    simd == nullptr ? unsetenv("PYCOLL_SIMD") : setenv("PYCOLL_SIMD", simd, 1);
    bool ok = false;
    try {
      ok = holds(cpu::kernels().isa, std::string());
    } catch (const std::invalid_argument& e) {
      ok = holds(std::string(), std::string(e.what()));
    }
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void check_choice() {
  std::vector<std::string> possible;
  for_each_isa([&](const Kernels& k) { possible.insert(possible.begin(), k.isa); });
  CHECK(in_child(nullptr, [&](const std::string& isa, const std::string&) { return isa == possible.front(); }));
  for (const std::string& wanted : possible) {
    CHECK(in_child(wanted.c_str(), [&](const std::string& isa, const std::string&) { return isa == wanted; }));
  }
  CHECK(in_child("sse9", [&](const std::string& isa, const std::string& error) {
    bool says_all = isa.empty() && error.find("PYCOLL_SIMD=sse9") != std::string::npos;
    for (const std::string& p : possible) says_all = says_all && error.find(p) != std::string::npos;
    return says_all;
  }));
  CHECK(cpu::kernels_for("sse9") == nullptr);
  CHECK(cpu::kernels_for("baseline") != nullptr);
}

}  // namespace

int main() {
  check_choice();
  for_each_isa([](const Kernels& k) {
    check_floats<float>(k, DType::kFloat32);
    check_floats<double>(k, DType::kFloat64);
    check_floats<Float16>(k, DType::kFloat16);
    check_floats<BFloat16>(k, DType::kBFloat16);
    check_average(k);
    check_integers(k);
    check_casts<Float16>(k, DType::kFloat16);
    check_casts<BFloat16>(k, DType::kBFloat16);
    check_copy(k);
  });
  return check::report();
}
