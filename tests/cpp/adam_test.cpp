// cpu/adam.h: every dtype, rule and length against fp64, the same bits for all instruction sets and cuttings and from the
// loops that GPUs run (core/adam_strided.h), averages, sums of squares, and rounding at random.
#include "cpu/adam.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "core/adam_strided.h"
#include "cpu/kernels.h"

using namespace pycoll;
using cpu::AdamArgs;
using cpu::AdamKernels;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kLengths[] = {0, 1, 17, cpu::kAdamBlock, 3 * cpu::kAdamBlock + 123};

std::vector<const AdamKernels*> all_kernels() {
  std::vector<const AdamKernels*> found;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (const AdamKernels* k = cpu::adam_kernels_for(isa)) found.push_back(k);
  }
  return found;
}

// How a step is made.
struct Rules {
  bool amsgrad = false, maximize = false, decoupled = true, master = true, stochastic = false;
  AdamSettings settings() const { return {1e-3, 0.9, 0.95, 1e-8, 0.1, decoupled, maximize}; }
};

Bytes bytes_of(const void* data, size_t bytes) {
  const auto* begin = static_cast<const std::byte*>(data);
  return Bytes(begin, begin + bytes);
}

template <class T>
Bytes rounded(const std::vector<float>& values) {
  std::vector<T> result;
  for (const float v : values) result.push_back(narrow<T>(v));
  return bytes_of(result.data(), result.size() * sizeof(T));
}

template <class T>
T at(const Bytes& bytes, size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

// What a tensor has, before a step or after it.
struct Tensor {
  Bytes param, grad, master, exp_avg, exp_avg_sq, max_exp_avg_sq;
  bool operator==(const Tensor&) const = default;
};

template <class P, class G>
Tensor make_tensor(size_t n, bool master) {
  std::mt19937 random(static_cast<unsigned>(n) + 1);
  std::normal_distribution<float> normal;
  std::vector<float> p(n), g(n), m(n), v(n), w(n);
  for (size_t i = 0; i < n; ++i) {
    p[i] = normal(random);
    g[i] = normal(random) * 8;
    m[i] = normal(random) * 0.1f;
    v[i] = std::abs(normal(random)) * 0.01f;
    w[i] = std::abs(normal(random)) * 0.02f;
  }
  const Bytes wide = kWidens<P> && master ? rounded<float>(p) : Bytes();
  return {rounded<P>(p), rounded<G>(g), wide, rounded<float>(m), rounded<float>(v), rounded<float>(w)};
}

// Steps, in pieces of `piece` elements; `shift`: bytes off alignment; the first copies of the parameter's new value are
// compared with the others.
template <class P, class G>
Tensor stepped(const AdamKernels& k, DType dtype, DType grad_dtype, const Tensor& t, const Rules& rules,
               const AdamScalars& scalars, size_t shift, size_t piece, bool streams) {
  Buffer param(t.param, shift), other(t.param.size(), shift + 2), grad(t.grad, shift), master(t.master, shift),
      exp_avg(t.exp_avg, shift), exp_avg_sq(t.exp_avg_sq, shift), most(t.max_exp_avg_sq, shift);
  const size_t n = t.exp_avg.size() / sizeof(float);
  const auto floats = [](Buffer& b, size_t i) { return reinterpret_cast<float*>(b.data()) + i; };
  for (size_t i = 0; i < n || i == 0; i += piece) {
    void* const dst[] = {param.data() + i * sizeof(P), other.data() + i * sizeof(P)};
    const void* const piece_of_grad = grad.data() + i * sizeof(G);
    k.update[static_cast<int>(dtype)][static_cast<int>(grad_dtype)]({
        .param = dst[0],
        .master = t.master.empty() ? nullptr : floats(master, i),
        .dst = dst,
        .dst_count = 2,
        .grads = &piece_of_grad,
        .grad_count = 1,
        .exp_avg = floats(exp_avg, i),
        .exp_avg_sq = floats(exp_avg_sq, i),
        .max_exp_avg_sq = rules.amsgrad ? floats(most, i) : nullptr,
        .count = std::min(piece, n - i),
        .first = (uint64_t{1} << 32) - 20 + i,
        .stochastic = rules.stochastic,
        .scalars = scalars,
        .streams = streams,
    });
  }
  CHECK(param.content() == other.content());
  for (const Buffer* b : {&param, &other, &grad, &master, &exp_avg, &exp_avg_sq, &most}) CHECK(b->guards_intact());
  CHECK(grad.content() == t.grad);
  return {param.content(), grad.content(), master.content(), exp_avg.content(), exp_avg_sq.content(), most.content()};
}

// Thread `index` of `count` that share a loop.
struct Share {
  size_t index, count;
  size_t thread() const { return index; }
  size_t size() const { return count; }
};

// The same step as a block of a GPU makes it, in which threads run one after another.
template <class P, class G>
Tensor stepped_strided(const Tensor& t, const Rules& rules, const AdamScalars& scalars, size_t shift) {
  Buffer param(t.param, shift), grad(t.grad, shift), master(t.master, shift), exp_avg(t.exp_avg, shift),
      exp_avg_sq(t.exp_avg_sq, shift), most(t.max_exp_avg_sq, shift);
  const auto floats = [](Buffer& b) { return reinterpret_cast<float*>(b.data()); };
  constexpr size_t kThreads = 5;
  for (size_t i = 0; i < kThreads; ++i) {
    adam_strided<P, G>(Share{i, kThreads},
                       AdamPiece{param.data(), grad.data(), t.master.empty() ? nullptr : floats(master),
                                 floats(exp_avg), floats(exp_avg_sq), rules.amsgrad ? floats(most) : nullptr,
                                 t.exp_avg.size() / sizeof(float), (uint64_t{1} << 32) - 20, rules.stochastic},
                       scalars);
  }
  for (const Buffer* b : {&param, &grad, &master, &exp_avg, &exp_avg_sq, &most}) CHECK(b->guards_intact());
  return {param.content(), grad.content(), master.content(), exp_avg.content(), exp_avg_sq.content(), most.content()};
}

// The textbook, in fp64, from the values that the arrays hold.
struct Exact {
  double param, exp_avg, exp_avg_sq, max_exp_avg_sq, update;
};

template <class P, class G>
Exact exact(const Tensor& t, size_t i, const Rules& rules, uint32_t step, double factor) {
  const AdamSettings s = rules.settings();
  const double p = t.master.empty() ? widen(at<P>(t.param, i)) : at<float>(t.master, i);
  double g = widen(at<G>(t.grad, i)) * factor * (rules.maximize ? -1 : 1);
  if (!rules.decoupled) g += s.weight_decay * p;
  Exact e{};
  e.exp_avg = s.beta1 * at<float>(t.exp_avg, i) + (1 - s.beta1) * g;
  e.exp_avg_sq = s.beta2 * at<float>(t.exp_avg_sq, i) + (1 - s.beta2) * g * g;
  e.max_exp_avg_sq = std::max<double>(at<float>(t.max_exp_avg_sq, i), e.exp_avg_sq);
  const double first = e.exp_avg / (1 - std::pow(s.beta1, step));
  const double second = (rules.amsgrad ? e.max_exp_avg_sq : e.exp_avg_sq) / (1 - std::pow(s.beta2, step));
  e.update = s.lr * first / (std::sqrt(second) + s.eps) + (rules.decoupled ? s.lr * s.weight_decay * p : 0);
  e.param = p - e.update;
  return e;
}

bool near(double value, double wanted, double tolerance) { return std::abs(value - wanted) <= tolerance; }

template <class P, class G>
void check_values(const Tensor& before, const Tensor& after, const Rules& rules, uint32_t step, double factor) {
  constexpr double kUlp = 1.2e-7, kParamUlp = sizeof(P) == 4 ? kUlp : std::is_same_v<P, Float16> ? 9.8e-4 : 7.9e-3;
  for (size_t i = 0; i < after.exp_avg.size() / sizeof(float); ++i) {
    const Exact e = exact<P, G>(before, i, rules, step, factor);
    const double g = std::abs(widen(at<G>(before.grad, i)) * factor) + 1;
    CHECK(near(at<float>(after.exp_avg, i), e.exp_avg, 4 * kUlp * g));
    CHECK(near(at<float>(after.exp_avg_sq, i), e.exp_avg_sq, 4 * kUlp * g * g));
    if (rules.amsgrad) CHECK(near(at<float>(after.max_exp_avg_sq, i), e.max_exp_avg_sq, 4 * kUlp * g * g));
    if (!rules.amsgrad) CHECK_EQ(at<float>(after.max_exp_avg_sq, i), at<float>(before.max_exp_avg_sq, i));
    const double wide = kUlp * (std::abs(e.param) + 8 * std::abs(e.update) + 1e-6);
    if (!after.master.empty()) {
      const float master = at<float>(after.master, i);
      CHECK(near(master, e.param, wide));
      if (!rules.stochastic) CHECK(widen(at<P>(after.param, i)) == widen(narrow<P>(master)));
    }
    CHECK(near(widen(at<P>(after.param, i)), e.param, wide + kParamUlp * std::abs(e.param)));
  }
}

template <class P, class G>
void check_update(DType dtype, DType grad_dtype) {
  for (int bits = 0; bits < 32; ++bits) {
    const Rules rules{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0};
    if (!kWidens<P> && (rules.master || rules.stochastic)) continue;
    for (const size_t n : kLengths) {
      const uint32_t step = bits % 2 == 0 ? 1 : 1000;
      const double factor = 0.3;
      const AdamScalars scalars = adam_scalars(rules.settings(), step, factor, 7);
      const Tensor before = make_tensor<P, G>(n, rules.master);
      const Tensor after =
          stepped<P, G>(*cpu::adam_kernels_for("baseline"), dtype, grad_dtype, before, rules, scalars, 0, n + 1, false);
      check_values<P, G>(before, after, rules, step, factor);
      for (const size_t shift : {0, 4}) CHECK((stepped_strided<P, G>(before, rules, scalars, shift) == after));
      for (const AdamKernels* k : all_kernels()) {
        for (const size_t piece : {n + 1, size_t{700}}) {
          for (const bool streams : {false, true}) {
            CHECK((stepped<P, G>(*k, dtype, grad_dtype, before, rules, scalars, 4, piece, streams) == after));
          }
        }
      }
    }
  }
}

template <class P>
void check_updates(DType dtype) {
  check_update<P, float>(dtype, DType::kFloat32);
  check_update<P, Float16>(dtype, DType::kFloat16);
  check_update<P, BFloat16>(dtype, DType::kBFloat16);
}

// What fp32 gradients make of one element that is `param` with the given moments.
float one_step(float param, float grad, const AdamSettings& settings) {
  float m = 0, v = 0;
  void* const dst[] = {&param};
  const void* const grads[] = {&grad};
  cpu::adam_kernels().update[0][0](
      {&param, nullptr, dst, 1, grads, 1, &m, &v, nullptr, 1, 0, false, adam_scalars(settings, 1, 1, 0)});
  return param;
}

void check_special_values() {
  const AdamSettings plain{1e-3, 0.9, 0.999, 1e-8, 0, true, false};
  CHECK_EQ(one_step(-kInfinity, 0, plain), -kInfinity);
  CHECK(std::isnan(one_step(1, kNaN, plain)));
  CHECK(std::isnan(one_step(1, kInfinity, plain)));
  CHECK_EQ(one_step(1, 0, plain), 1.0f);
  CHECK(near(one_step(1, 1e-3f, plain), 1 - 1e-3, 2e-7));  // the first step is lr, whatever the gradient
  CHECK_EQ(one_step(2, 0, {1e-3, 0.9, 0.999, 1e-8, 1, true, false}), 2 - 2e-3f);
}

void check_clipping() {
  const Clipped small = clip_to_norm(9, 1, 5), large = clip_to_norm(100.0 * 64 * 64, 64, 5);
  CHECK_EQ(small.norm, 3.0f);
  CHECK_EQ(small.factor, 1.0f);
  CHECK_EQ(small.found_inf, 0.0f);
  CHECK_EQ(large.norm, 10.0f);
  CHECK(near(large.factor * 64, 0.5, 1e-6));
  CHECK_EQ(clip_to_norm(kInfinity, 1, 5).found_inf, 1.0f);
  CHECK_EQ(clip_to_norm(kInfinity, 1, 5).factor, 0.0f);
  CHECK_EQ(clip_to_norm(kNaN, 1, 5).found_inf, 1.0f);
  CHECK(std::isnan(clip_to_norm(kNaN, 1, 5).factor));
  CHECK_EQ(clip_to_norm(0, 1, kInfinity).factor, 1.0f);
}

double sum_of_squares(const AdamKernels& k, DType dtype, const void* x, size_t n) {
  return k.measure[static_cast<int>(dtype)](nullptr, &x, 1, n);
}

template <class T>
void check_squares(DType dtype) {
  for (const size_t n : kLengths) {
    const Tensor t = make_tensor<T, T>(n, false);
    long double wanted = 0;
    for (size_t i = 0; i < n; ++i) wanted += std::pow(static_cast<long double>(widen(at<T>(t.grad, i))), 2);
    const double first = sum_of_squares(*cpu::adam_kernels_for("baseline"), dtype, t.grad.data(), n);
    CHECK(near(first, static_cast<double>(wanted), 1e-12 * static_cast<double>(wanted)));
    for (const size_t shift : {0, 2}) {
      Buffer grad(t.grad, shift);
      double sum = 0;
      for (size_t i = 0; i < 3; ++i) sum += squares_strided<T>(Share{i, 3}, grad.data(), n);
      CHECK(near(sum, first, 1e-12 * first));
    }
    for (const AdamKernels* k : all_kernels()) {
      const auto squares = [&](const void* x, size_t count) { return sum_of_squares(*k, dtype, x, count); };
      for (const size_t shift : {0, 2}) {
        Buffer grad(t.grad, shift);
        CHECK_EQ(squares(grad.data(), n), first);
        for (size_t i = 0; i < n; i += 1 + n / 40) {
          for (const float bad : {kNaN, kInfinity, -kInfinity}) {
            const T element = narrow<T>(bad);
            std::memcpy(grad.data() + i * sizeof(T), &element, sizeof(T));
            CHECK(!std::isfinite(squares(grad.data(), n)));
            std::memcpy(grad.data() + i * sizeof(T), t.grad.data() + i * sizeof(T), sizeof(T));
          }
        }
      }
    }
  }
  for (const AdamKernels* k : all_kernels()) {
    const std::vector<T> large(1000, narrow<T>(sizeof(T) == 4 ? 3e38f : 6e4f));
    CHECK(std::isfinite(sum_of_squares(*k, dtype, large.data(), large.size())));
    CHECK_EQ(sum_of_squares(*k, dtype, nullptr, 0), 0.0);
  }
}

// The average of several arrays, and an update by it, beside the same of what the elements give one by one.
template <class P, class G>
void check_averages(DType dtype, DType grad_dtype) {
  const Rules rules{};
  for (const size_t n : kLengths) {
    Tensor before = make_tensor<P, G>(n, kWidens<P>);
    const AdamScalars scalars = adam_scalars(rules.settings(), 3, 0.3, 7);
    std::vector<Bytes> all;
    std::vector<float> sum(n), average(n);
    for (int count = 1; count <= cpu::kMostGrads; ++count) {
      all.push_back(make_tensor<P, G>(n + 7 * count, false).grad);
      for (size_t i = 0; i < n; ++i) {
        sum[i] = count == 1 ? widen(at<G>(all[0], i)) : sum[i] + widen(at<G>(all.back(), i));
        average[i] = count == 1 ? sum[i] : sum[i] / static_cast<float>(count);
      }
      before.grad = rounded<float>(average);
      const Tensor wanted = stepped<P, float>(*cpu::adam_kernels_for("baseline"), dtype, DType::kFloat32, before, rules,
                                              scalars, 0, n + 1, false);
      const double squares = sum_of_squares(*cpu::adam_kernels_for("baseline"), DType::kFloat32, average.data(), n);
      for (const AdamKernels* k : all_kernels()) {
        for (const bool streams : {false, true}) {
          std::vector<Buffer> arrays;
          for (const Bytes& bytes : all) arrays.emplace_back(bytes, 4);
          std::vector<const void*> places;
          for (Buffer& array : arrays) places.push_back(array.data());
          const auto measure = k->measure[static_cast<int>(grad_dtype)];
          Buffer to(before.grad, 4);
          std::memset(to.data(), 0xff, n * sizeof(float));
          CHECK_EQ(measure(nullptr, places.data(), count, n), squares);
          CHECK_EQ(measure(reinterpret_cast<float*>(to.data()), places.data(), count, n), squares);
          CHECK(to.content() == before.grad && to.guards_intact());
          Buffer param(before.param, 4), master(before.master, 4), m(before.exp_avg, 4), v(before.exp_avg_sq, 4);
          const auto floats = [](Buffer& b) { return reinterpret_cast<float*>(b.data()); };
          void* const dst[] = {param.data()};
          k->update[static_cast<int>(dtype)][static_cast<int>(grad_dtype)](
              {dst[0], kWidens<P> ? floats(master) : nullptr, dst, 1, places.data(), count, floats(m), floats(v),
               nullptr, n, (uint64_t{1} << 32) - 20, false, scalars, streams});
          CHECK(param.content() == wanted.param && master.content() == wanted.master);
          CHECK(m.content() == wanted.exp_avg && v.content() == wanted.exp_avg_sq);
          for (const Buffer* b : {&param, &master, &m, &v}) CHECK(b->guards_intact());
          if constexpr (std::is_same_v<G, float>) {  // where the first of them lies
            CHECK_EQ(measure(floats(arrays[0]), places.data(), count, n), squares);
            const Bytes first = arrays[0].content();
            CHECK(std::equal(before.grad.begin(), before.grad.end(), first.begin()));
          }
          for (const Buffer& array : arrays) CHECK(array.guards_intact());
        }
      }
    }
  }
}

// How often `value` is rounded up, of all 65536 that 16 random bits can do; else it must go down.
template <class T>
double share_up(float value, T down, T up) {
  int ups = 0;
  for (uint32_t r = 0; r < 65536; ++r) {
    const T result = round_at_random<T>(value, r | 0xabcd0000);
    CHECK(result.bits == down.bits || result.bits == up.bits);
    ups += result.bits == up.bits;
  }
  return ups / 65536.0;
}

template <class T>
void check_rounding() {
  for (uint32_t bits = 0; bits < 0x7c00; bits += 97) {
    for (const uint16_t sign : {0, 0x8000}) {
      const T down{static_cast<uint16_t>(bits | sign)}, up{static_cast<uint16_t>((bits + 1) | sign)};
      const float low = down.to_float(), high = up.to_float();
      if (std::isinf(high)) continue;
      CHECK_EQ(round_at_random<T>(low, 0xffffffff).bits, down.bits);  // what needs no rounding stays
      const float quarter = low + (high - low) * 0.25f;
      if (bits % 5 == 0 && quarter != low) CHECK(near(share_up<T>(quarter, down, up), 0.25, 1.0 / 65536));
    }
  }
  for (const float special : {kInfinity, -kInfinity, kNaN, -kNaN, 0.0f, -0.0f}) {
    CHECK_EQ(round_at_random<T>(special, 0xffffffff).bits, T::from_float(special).bits);
  }
}

// The generator: all of its bits are as often one as zero, and what differs in step, seed or index differs in them.
void check_generator() {
  const AdamSettings settings{};
  const AdamScalars a = adam_scalars(settings, 1, 1, 0), b = adam_scalars(settings, 2, 1, 0),
                    c = adam_scalars(settings, 1, 1, 1);
  constexpr int kCount = 1 << 16;
  std::vector<int> ones(32), same(3);
  for (uint64_t i = 0; i < kCount; ++i) {
    const uint32_t r = random_bits(a.key, i);
    for (int bit = 0; bit < 32; ++bit) ones[bit] += r >> bit & 1;
    same[0] += (r & 0xff) == (random_bits(b.key, i) & 0xff);
    same[1] += (r & 0xff) == (random_bits(c.key, i) & 0xff);
    same[2] += (r & 0xff) == (random_bits(a.key, i + (uint64_t{1} << 32)) & 0xff);
  }
  for (const int count : ones) CHECK(std::abs(count - kCount / 2) < 5 * std::sqrt(kCount) / 2);
  for (const int count : same) CHECK(std::abs(count - kCount / 256) < 6 * std::sqrt(kCount / 256.0));
}

}  // namespace

int main() {
  check_updates<float>(DType::kFloat32);
  check_updates<Float16>(DType::kFloat16);
  check_updates<BFloat16>(DType::kBFloat16);
  check_special_values();
  check_clipping();
  check_squares<float>(DType::kFloat32);
  check_squares<Float16>(DType::kFloat16);
  check_squares<BFloat16>(DType::kBFloat16);
  check_averages<float, float>(DType::kFloat32, DType::kFloat32);
  check_averages<float, BFloat16>(DType::kFloat32, DType::kBFloat16);
  check_averages<BFloat16, Float16>(DType::kBFloat16, DType::kFloat16);
  check_averages<BFloat16, BFloat16>(DType::kBFloat16, DType::kBFloat16);
  check_rounding<BFloat16>();
  check_rounding<Float16>();
  check_generator();
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    CHECK((cpu::adam_kernels_for(isa) == nullptr) == (cpu::kernels_for(isa) == nullptr));
  }
  CHECK(&cpu::adam_kernels() == cpu::adam_kernels_for(cpu::kernels().isa));
  CHECK(cpu::adam_kernels_for("sse9") == nullptr);
  return check::report();
}
