// core/pack_strided.h, the loops that GPUs run, on host threads that share them: every dtype into every wire, odd sizes, any
// alignment, with what is not finite, must give the bits of the CPU's own (cpu/bucket.h).
#include <algorithm>
#include <barrier>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "core/pack_strided.h"
#include "cpu/bucket.h"

using namespace pycoll;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kFirst = 3 * kScaleBlock, kLengths[] = {0, 1, 7, 255, 256, 257, 1023, 3000};
constexpr Wire kWires[] = {Wire::kFloat32, Wire::kFloat16, Wire::kBFloat16, Wire::kInt8};

// What the threads of a block share.
struct Block {
  explicit Block(size_t threads, size_t of_group) : threads(threads), of_group(of_group) {
    for (size_t k = 0; k < threads / of_group; ++k) {
      meetings.push_back(std::make_unique<std::barrier<>>(static_cast<std::ptrdiff_t>(of_group)));
    }
  }
  const size_t threads, of_group;
  std::vector<std::unique_ptr<std::barrier<>>> meetings;
  std::vector<int32_t> given = std::vector<int32_t>(threads);
};

// One of them.
struct Share {
  size_t at, count;
  size_t thread() const { return at; }
  size_t size() const { return count; }
};

// One of them as a thread of a warp of kWarp.
template <unsigned kWarp>
struct WarpShare {
  static constexpr unsigned kThreads = kWarp;
  Block& block;
  size_t at;
  size_t thread() const { return at % kWarp; }
  size_t index() const { return at / kWarp; }
  size_t groups() const { return block.threads / kWarp; }
  int32_t largest(int32_t x) const {
    block.given[at] = x;
    block.meetings[index()]->arrive_and_wait();
    const auto first = block.given.begin() + static_cast<long>(index() * kWarp);
    const int32_t result = *std::max_element(first, first + kWarp);
    block.meetings[index()]->arrive_and_wait();  // all have looked
    return result;
  }
};

// f(thread) as each of so many; whether all of them said true.
template <class F>
bool on_threads(size_t count, const F& f) {
  std::vector<char> said(count);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t) threads.emplace_back([&, t] { said[t] = f(t); });
  for (std::thread& thread : threads) thread.join();
  return std::all_of(said.begin(), said.end(), [](char yes) { return yes; });
}

template <class G>
bool packed_by_threads(Wire wire, const PackPiece& p, const float* factor) {
  constexpr size_t kThreads = 4;
  constexpr unsigned kWarp = 2;
  if (p.grad == nullptr) {
    return on_threads(kThreads, [&](size_t t) { return pack_zeros(Share{t, kThreads}, wire, p), true; });
  }
  if (wire == Wire::kInt8) {
    Block block(kThreads, kWarp);
    return on_threads(kThreads, [&](size_t t) { return pack_int8_strided<G>(WarpShare<kWarp>{block, t}, p, factor); });
  }
  return dispatch_dtype(dtype_of(wire), [&](auto tag) {
    using W = typename decltype(tag)::type;
    if constexpr (std::is_same_v<W, float> || kWidens<W>) {
      return on_threads(kThreads, [&](size_t t) { return pack_strided<G, W>(Share{t, kThreads}, p, factor); });
    } else {
      return false;
    }
  });
}

template <class G>
std::vector<G> gradient(size_t n, float factor) {
  std::mt19937 random(static_cast<unsigned>(n) + 1);
  std::normal_distribution<float> normal;
  std::vector<G> values(n);
  for (G& v : values) v = narrow<G>(normal(random) * factor);
  return values;
}

template <class G>
bool all_finite(Wire wire, const std::byte* memory, size_t first, size_t n) {
  for (size_t i = first; i < first + n; ++i) {
    if (wire == Wire::kInt8) {
      const float scale = reinterpret_cast<const Int8Unit*>(memory)[i / kUnit].scales[i % kUnit / kScaleBlock];
      if (!std::isfinite(scale)) return false;
    } else {
      float value = 0;
      if (wire == Wire::kFloat32) std::memcpy(&value, memory + i * sizeof(float), sizeof(float));
      uint16_t bits = 0;
      if (wire != Wire::kFloat32) std::memcpy(&bits, memory + i * sizeof bits, sizeof bits);
      if (wire == Wire::kFloat16) value = Float16{bits}.to_float();
      if (wire == Wire::kBFloat16) value = BFloat16{bits}.to_float();
      if (!std::isfinite(value)) return false;
    }
  }
  return true;
}

// The bits of the CPU's packing, beside it nothing, and whether all is finite.
template <class G>
void check_pack(DType dtype, Wire wire, const std::vector<G>& grad, size_t shift, bool leaves_residual) {
  const size_t n = grad.size(), units = (kFirst + n + kUnit - 1) / kUnit + 1, bytes = units * unit_bytes(wire);
  Bytes content(n * sizeof(G));
  if (n != 0) std::memcpy(content.data(), grad.data(), content.size());
  const Bytes blank(bytes, std::byte{0x11});
  // What lies between parameters is zero in the residual.
  std::vector<float> left(units * kUnit, 0.0f);
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < n; ++i) left[kFirst + i] = normal(random) * 0.01f;
  std::vector<float> other_left = left;
  for (int step = 0; step < (leaves_residual ? 3 : 1); ++step) {
    // A wire of floats may begin anywhere.
    Buffer from(content, shift), expected(blank, 0), found(blank, wire == Wire::kInt8 ? 0 : shift);
    cpu::pack(wire, from.data(), dtype, kFirst, n, expected.data(), leaves_residual ? left.data() : nullptr);
    const bool finite = packed_by_threads<G>(
        wire, {from.data(), found.data(), leaves_residual ? other_left.data() : nullptr, kFirst, n}, nullptr);
    CHECK(found.content() == expected.content());
    CHECK(found.guards_intact());
    CHECK(std::memcmp(left.data(), other_left.data(), left.size() * sizeof(float)) == 0);
    CHECK_EQ(finite, all_finite<G>(wire, expected.data(), kFirst, n));
  }
  Buffer expected(blank, 0), found(blank, 0);
  cpu::pack(wire, nullptr, dtype, kFirst, n, expected.data(), nullptr);
  CHECK(packed_by_threads<G>(wire, {nullptr, found.data(), nullptr, kFirst, n}, nullptr));
  CHECK(found.content() == expected.content());
}

template <class G>
void check_packs(DType dtype) {
  for (const Wire wire : kWires) {
    for (const size_t n : kLengths) {
      for (const size_t shift : {size_t{0}, sizeof(G), size_t{8}}) {
        for (const bool leaves_residual : {false, true}) {
          if (leaves_residual && wire != Wire::kInt8) continue;
          std::vector<G> grad = gradient<G>(n, 3);
          check_pack(dtype, wire, grad, shift, leaves_residual);
          if (n == 0 || shift != sizeof(G)) continue;
          for (const float bad : {kInfinity, -kInfinity, kNaN, 3e38f, 1e5f, 1e-40f, -0.0f}) {
            std::vector<G> worse = grad;
            worse[n - 1 - n / 3] = narrow<G>(bad);
            check_pack(dtype, wire, worse, shift, leaves_residual);
          }
        }
      }
    }
  }
}

// A factor counts in fp32, before rounding.
template <class G>
void check_factor() {
  const float factor = 0.3f;
  for (const Wire wire : kWires) {
    const std::vector<G> grad = gradient<G>(1000, 2);
    std::vector<float> scaled;
    for (const G g : grad) scaled.push_back(widen(g) * factor);
    const Bytes blank(4 * unit_bytes(wire));
    Buffer expected(blank, 0), found(blank, 0);
    cpu::pack(wire, scaled.data(), DType::kFloat32, kFirst, scaled.size(), expected.data(), nullptr);
    CHECK(packed_by_threads<G>(wire, {grad.data(), found.data(), nullptr, kFirst, grad.size()}, &factor));
    CHECK(found.content() == expected.content());
    const float infinite = kInfinity;
    CHECK(!packed_by_threads<G>(wire, {grad.data(), found.data(), nullptr, kFirst, grad.size()}, &infinite));
  }
}

// A warp as GPUs have it: a part a thread.
void check_whole_warp() {
  const std::vector<float> grad = gradient<float>(kUnit, 1);
  const Bytes blank(2 * sizeof(Int8Unit));
  Buffer expected(blank, 0), found(blank, 0);
  cpu::pack(Wire::kInt8, grad.data(), DType::kFloat32, 0, kUnit, expected.data(), nullptr);
  Block block(64, 32);
  CHECK(on_threads(64, [&](size_t t) {
    return pack_int8_strided<float>(WarpShare<32>{block, t}, {grad.data(), found.data(), nullptr, 0, kUnit}, nullptr);
  }));
  CHECK(found.content() == expected.content());
}

void check_average() {
  constexpr size_t kUnits = 5;
  for (const int world : {1, 2, 3, 7}) {
    std::vector<Int8Unit> wires(kUnits * static_cast<size_t>(world));
    std::vector<const void*> each;
    for (int r = 0; r < world; ++r) {
      std::vector<float> grad = gradient<float>(kUnits * kUnit - 3, 1.0f + static_cast<float>(r));
      if (r == 1) grad[700] = kNaN;
      Int8Unit* const wire = &wires[kUnits * static_cast<size_t>(r)];
      cpu::pack(Wire::kInt8, grad.data(), DType::kFloat32, 0, grad.size(), wire, nullptr);
      each.push_back(wire);
    }
    std::vector<float> expected(kUnits * kUnit), found(kUnits * kUnit);
    const std::vector<void*> out(static_cast<size_t>(world), expected.data());
    std::vector<double> squares(kUnits);
    const cpu::Shard shard{Wire::kInt8, 0, world, kUnits * static_cast<size_t>(world)};
    cpu::reduce_units(shard, each.data(), out.data(), squares.data(), 0, kUnits);
    on_threads(3, [&](size_t t) {
      average_int8_strided(Share{t, 3}, wires.data(), world, kUnits, found.data());
      return true;
    });
    for (size_t i = 0; i < found.size(); ++i) {
      CHECK(std::isnan(expected[i]) ? std::isnan(found[i]) : expected[i] == found[i]);
    }
  }
}

}  // namespace

int main() {
  check_packs<float>(DType::kFloat32);
  check_packs<Float16>(DType::kFloat16);
  check_packs<BFloat16>(DType::kBFloat16);
  check_factor<float>();
  check_factor<Float16>();
  check_factor<BFloat16>();
  check_whole_warp();
  check_average();
  return check::report();
}
