// The loops of cpu/adam.h, plain ones: included once per instruction set, after its target_*.h, which says what
// holds for such files, and block_body.h.
#pragma once

namespace pycoll::cpu {
namespace {

// Elements that one array after another is gone through for. While a loop works on what lies in the cache nothing asks
// for memory, so these turns are short enough for a processor to look past them (1024 took a quarter longer).
constexpr size_t kTile = 128;
static_assert(kMostGrads == kFanIn);

// What loops read where elements are of T.
template <class T>
using Readable = std::conditional_t<kConvertsInLoop<T>, T, float>;

// Calls f with elements at .. at+n of `count` arrays of T, Readable, as arguments: where they lie, or at most kTile of
// them widened.
template <class T, class F>
PYCOLL_HD void with_elements(const void* const* arrays, int count, size_t at, size_t n, F f) {
  float buffers[kFanIn][kConvertsInLoop<T> ? 1 : kTile];
  const void* places[kFanIn];
  for (int k = 0; k < count; ++k) {
    places[k] = static_cast<const std::byte*>(arrays[k]) + at * sizeof(T);
    if constexpr (!kConvertsInLoop<T>) {
      widen_block<T>(buffers[k], places[k], n);
      places[k] = buffers[k];
    }
  }
  with_sources(places, count, f);
}

// Element i of the average of arrays of T.
template <class T, class... Rest>
PYCOLL_HD float average(size_t i, const void* first, Rest... rest) {
  constexpr Reduce<ReduceOp::kAvg> kAverage;
  float sum = widen(load<T>(first, i));
  ((sum = kAverage(sum, widen(load<T>(rest, i)))), ...);
  return sizeof...(rest) == 0 ? sum : kAverage.finalize(sum, 1 + static_cast<int>(sizeof...(rest)));
}

// to[i] = the update of from[i], all fp32, by gradients of G. PYCOLL_INDEPENDENT holds where `to` is `from`, too.
template <bool kAmsgrad, class G, class... Grads>
void update_loop(void* to, const void* from, const AdamArgs& a, size_t at, size_t n, Grads... grads) {
  const AdamScalars s = a.scalars;
  float* const exp_avg = a.exp_avg + at;
  float* const exp_avg_sq = a.exp_avg_sq + at;
  float* const max_exp_avg_sq = kAmsgrad ? a.max_exp_avg_sq + at : nullptr;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    AdamMoments moments{load<float>(exp_avg, i), load<float>(exp_avg_sq, i),
                        kAmsgrad ? load<float>(max_exp_avg_sq, i) : 0};
    store(to, i, adam_update<kAmsgrad>(s, load<float>(from, i), average<G>(i, grads...), moments));
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

template <class P, class G>
void update_tile(const AdamArgs& a, size_t at, size_t n) {
  float widened[kWidens<P> ? kTile : 1];
  alignas(64) std::byte narrowed[kWidens<P> ? kTile * sizeof(P) : 1];
  void* const dst = static_cast<std::byte*>(a.dst[0]) + at * sizeof(P);
  const void* from = nullptr;
  void *to = dst, *result = dst;
  bool first_streams = false;
  if constexpr (kWidens<P>) {
    const bool has_master = a.master != nullptr;
    if (!has_master) widen_block<P>(widened, static_cast<const std::byte*>(a.param) + at * sizeof(P), n);
    from = to = has_master ? a.master + at : widened;
    first_streams = has_master && a.streams;
    if (first_streams) result = narrowed;
  } else {
    from = static_cast<const std::byte*>(a.param) + at * sizeof(P);
  }
  with_elements<G>(a.grads, a.grad_count, at, n, [&](auto... grads) {
    if (a.max_exp_avg_sq != nullptr) {
      update_loop<true, Readable<G>>(to, from, a, at, n, grads...);
    } else {
      update_loop<false, Readable<G>>(to, from, a, at, n, grads...);
    }
  });
  if constexpr (kWidens<P>) {
    if (a.stochastic) {
      round_block_at_random<P>(result, static_cast<const float*>(to), a, at, n);
    } else {
      narrow_block<P>(result, to, n);
    }
  }
  for (int d = first_streams ? 0 : 1; d < a.dst_count; ++d) {
    (a.streams ? stream : copy)(static_cast<std::byte*>(a.dst[d]) + at * sizeof(P), result, n * sizeof(P));
  }
}

// No prefetching: an update reads its arrays from end to end, which processors foresee.
template <class P, class G>
void update(const AdamArgs& a) {
  // What is streamed goes in whole lines of the cache: the first tile ends where one does.
  size_t tile = a.streams ? -reinterpret_cast<uintptr_t>(a.dst[0]) % 64 / sizeof(P) : 0;
  if (tile == 0) tile = kTile;
  for (size_t at = 0; at < a.count; at += tile, tile = kTile) {
    update_tile<P, G>(a, at, a.count - at < tile ? a.count - at : tile);
  }
}

// As many sums as make the loop fast everywhere, in an order that no instruction set changes. Squares of floats are
// exact in fp64, and their sum cannot overflow.
constexpr size_t kSums = 16;
static_assert(kTile % kSums == 0);

template <bool kStores, class T, class... Arrays>
void measure_loop(double (&total)[kSums], float* to, size_t n, Arrays... arrays) {
  double sums[kSums];  // which no store can change
  for (size_t j = 0; j < kSums; ++j) sums[j] = total[j];
  const auto add = [&](size_t i, double& sum) {
    const float value = average<T>(i, arrays...);
    if constexpr (kStores) store(to, i, value);
    sum += static_cast<double>(value) * value;
  };
  size_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    PYCOLL_INDEPENDENT
    for (size_t j = 0; j < kSums; ++j) add(i + j, sums[j]);
  }
  for (size_t j = 0; i + j < n; ++j) add(i + j, sums[j]);
  for (size_t j = 0; j < kSums; ++j) total[j] = sums[j];
}

template <class T>
double measure(float* to, const void* const* arrays, int count, size_t n) {
  double sums[kSums] = {};
  const size_t tile = kConvertsInLoop<T> ? n : kTile;
  for (size_t at = 0; at < n; at += tile) {
    const size_t here = n - at < tile ? n - at : tile;
    with_elements<T>(arrays, count, at, here, [&](auto... places) {
      if (to != nullptr) {
        measure_loop<true, Readable<T>>(sums, to + at, here, places...);
      } else {
        measure_loop<false, Readable<T>>(sums, nullptr, here, places...);
      }
    });
  }
  for (size_t half = kSums / 2; half > 0; half /= 2) {
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

template <class P>
constexpr void fill_row(AdamKernels& table, DType dtype) {
  auto& row = table.update[static_cast<int>(dtype)];
  row[static_cast<int>(DType::kFloat32)] = update<P, float>;
  row[static_cast<int>(DType::kFloat16)] = update<P, Float16>;
  row[static_cast<int>(DType::kBFloat16)] = update<P, BFloat16>;
  table.measure[static_cast<int>(dtype)] = measure<P>;
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
