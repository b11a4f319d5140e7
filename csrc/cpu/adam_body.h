// The loops of cpu/adam.h, plain ones: included once per instruction set, after its target_*.h, which says what
// holds for such files, and block_body.h.
#pragma once

namespace pycoll::cpu {
namespace {

// to[i] = the update of from[i], all fp32. PYCOLL_INDEPENDENT holds where `to` is `from`, too.
template <bool kAmsgrad>
void update_loop(void* to, const void* from, const void* grad, const AdamArgs& a, size_t at, size_t n) {
  const AdamScalars s = a.scalars;
  float* const exp_avg = a.exp_avg + at;
  float* const exp_avg_sq = a.exp_avg_sq + at;
  float* const max_exp_avg_sq = kAmsgrad ? a.max_exp_avg_sq + at : nullptr;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    AdamMoments moments{load<float>(exp_avg, i), load<float>(exp_avg_sq, i),
                        kAmsgrad ? load<float>(max_exp_avg_sq, i) : 0};
    store(to, i, adam_update<kAmsgrad>(s, load<float>(from, i), load<float>(grad, i), moments));
    store(exp_avg, i, moments.exp_avg);
    store(exp_avg_sq, i, moments.exp_avg_sq);
    if constexpr (kAmsgrad) store(max_exp_avg_sq, i, moments.max_exp_avg_sq);
  }
}

template <class T>
void round_block_at_random(void* to, const float* from, const AdamArgs& a, size_t at, size_t n) {
  const uint32_t key[2] = {a.scalars.key[0], a.scalars.key[1]};
  const uint64_t first = a.first + at;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < n; ++i) store(to, i, round_at_random<T>(load<float>(from, i), random_bits(key, first + i)));
}

// Elements at .. at+n as floats: where they lie, or widened into `buffer`.
template <class T>
const void* floats(const void* base, size_t at, size_t n, float* buffer) {
  const auto* const elements = static_cast<const std::byte*>(base) + at * sizeof(T);
  if constexpr (!kWidens<T>) return elements;
  if constexpr (kWidens<T>) widen_block<T>(buffer, elements, n);
  return buffer;
}

template <class P, class G>
void update_block(const AdamArgs& a, size_t at, size_t n) {
  float widened_param[kWidens<P> ? kAdamBlock : 1], widened_grad[kWidens<G> ? kAdamBlock : 1];
  void* const dst = static_cast<std::byte*>(a.dst[0]) + at * sizeof(P);
  const bool has_master = kWidens<P> && a.master != nullptr;
  const void* const from = has_master ? a.master + at : floats<P>(a.param, at, n, widened_param);
  float* const wide = has_master ? a.master + at : widened_param;
  void* const to = kWidens<P> ? wide : dst;
  const void* const grad = floats<G>(a.grad, at, n, widened_grad);
  if (a.max_exp_avg_sq != nullptr) {
    update_loop<true>(to, from, grad, a, at, n);
  } else {
    update_loop<false>(to, from, grad, a, at, n);
  }
  alignas(64) std::byte narrow[kWidens<P> ? kAdamBlock * sizeof(P) : 1];
  const bool streams_all = kWidens<P> && has_master && a.streams;
  void* const result = streams_all ? narrow : dst;
  if constexpr (kWidens<P>) {
    if (a.stochastic) {
      round_block_at_random<P>(result, wide, a, at, n);
    } else {
      narrow_block<P>(result, wide, n);
    }
  }
  for (int d = streams_all ? 0 : 1; d < a.dst_count; ++d) {
    (a.streams ? stream : copy)(static_cast<std::byte*>(a.dst[d]) + at * sizeof(P), result, n * sizeof(P));
  }
}

// No prefetching: an update reads its arrays from end to end, which processors foresee.
template <class P, class G>
void update(const AdamArgs& a) {
  for (size_t at = 0; at < a.count; at += kAdamBlock) {
    update_block<P, G>(a, at, a.count - at < kAdamBlock ? a.count - at : kAdamBlock);
  }
}

// Squares of floats are exact in fp64, and their sum cannot overflow. As many sums as make the loop fast everywhere, in
// an order that no instruction set changes.
PYCOLL_HD double sum_of_float_squares(const void* x, size_t n) {
  constexpr size_t kSums = 16;
  double sums[kSums] = {};
  size_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (size_t j = 0; j < kSums; ++j) {
      const double value = load<float>(x, i + j);
      sums[j] += value * value;
    }
  }
  for (size_t j = 0; i + j < n; ++j) {
    const double value = load<float>(x, i + j);
    sums[j] += value * value;
  }
  for (size_t half = kSums / 2; half > 0; half /= 2) {
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

template <class T>
double sum_of_squares(const void* x, size_t n) {
  float widened[kWidens<T> ? kAdamBlock : 1];
  double sum = 0;
  for (size_t at = 0; at < n; at += kAdamBlock) {
    const size_t here = n - at < kAdamBlock ? n - at : kAdamBlock;
    sum += sum_of_float_squares(floats<T>(x, at, here, widened), here);
  }
  return sum;
}

template <class P>
constexpr void fill_row(AdamKernels& table, DType dtype) {
  auto& row = table.update[static_cast<int>(dtype)];
  row[static_cast<int>(DType::kFloat32)] = update<P, float>;
  row[static_cast<int>(DType::kFloat16)] = update<P, Float16>;
  row[static_cast<int>(DType::kBFloat16)] = update<P, BFloat16>;
  table.sum_of_squares[static_cast<int>(dtype)] = sum_of_squares<P>;
}

constexpr AdamKernels make_adam_table() {
  AdamKernels table{};
  fill_row<float>(table, DType::kFloat32);
  fill_row<Float16>(table, DType::kFloat16);
  fill_row<BFloat16>(table, DType::kBFloat16);
  return table;
}

}  // namespace
}  // namespace pycoll::cpu
