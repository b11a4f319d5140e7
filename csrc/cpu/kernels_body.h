// The loops of cpu/kernels.h, plain ones: included once per instruction set, after its target_*.h, which says what
// holds for such files, and block_body.h.
#pragma once

namespace pycoll::cpu {
namespace {

// dst[i] = first[i] op rest[i] op ...; finalized and rounded where kFinal. A destination that is a source is safe, and
// so the compiler is told: each element is read before it is written, and no other is.
template <class T, ReduceOp Op, bool kFinal, class... Rest>
void reduce_loop(void* dst, size_t n, int world, const void* first, Rest... rest) {
  constexpr Reduce<Op> kReduce;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    Accumulator<T> sum = widen(load<T>(first, i));
    ((sum = kReduce(sum, widen(load<T>(rest, i)))), ...);
    if constexpr (kFinal) {
      store(dst, i, narrow<T>(kReduce.finalize(sum, world)));
    } else {
      store(dst, i, sum);
    }
  }
}

// `fan` of at most kFanIn sources of T, all elements or (T being float) all accumulators.
template <class T, ReduceOp Op, bool kFinal>
void reduce_few(void* dst, const void* const* src, int fan, size_t n, int world) {
  with_sources(src, fan, [&](auto... sources) { reduce_loop<T, Op, kFinal>(dst, n, world, sources...); });
}

// Elements at .. at+n of source k as accumulators: where they lie, or widened into `buffer`.
template <class T>
const void* accumulators(const CombineArgs& a, int k, size_t at, size_t n, Accumulator<T>* buffer) {
  const auto* const source = static_cast<const std::byte*>(a.src[k]);
  if constexpr (kWidens<T>) {
    if (!a.is_wire(k)) {
      widen_block<T>(buffer, source + at * sizeof(T), n);
      return buffer;
    }
  }
  return source + at * sizeof(Accumulator<T>);
}

// The general way, for at most kBlock elements: a few sources at a time, as accumulators.
template <class T, ReduceOp Op>
void reduce_block(void* dst, const CombineArgs& a, size_t at, size_t n) {
  using A = Accumulator<T>;
  constexpr ReduceOp kStep = Op == ReduceOp::kAvg ? ReduceOp::kSum : Op;
  A sum[kBlock<T>];
  A widened[kFanIn][kWidens<T> ? kBlock<T> : 1];
  const void* src[kFanIn];
  int fan = 0;
  for (int k = 0;;) {
    while (fan < kFanIn && k < a.src_count) {
      src[fan] = accumulators<T>(a, k++, at, n, widened[fan]);
      ++fan;
    }
    if (k == a.src_count) break;
    reduce_few<A, kStep, false>(sum, src, fan, n, a.world);
    src[0] = sum;
    fan = 1;
  }
  const bool rounds = kWidens<T> && a.final;
  if constexpr (kWidens<T> && Op != ReduceOp::kAvg) {
    if (rounds && fan == 1) return narrow_block<T>(dst, src[0], n);
  }
  void* const to = rounds ? sum : dst;
  if (Op == ReduceOp::kAvg && a.final) {
    reduce_few<A, Op, Op == ReduceOp::kAvg>(to, src, fan, n, a.world);
  } else {
    reduce_few<A, kStep, false>(to, src, fan, n, a.world);
  }
  if constexpr (kWidens<T>) {
    if (rounds) narrow_block<T>(dst, sum, n);
  }
}

// Asks for the next block of each source while this one is worked on: the processor's own prefetcher stops at the end
// of a page. Sources of 16 bits, half as long, are better left to it. Inlined, always: a function that only prefetches
// is none to the compiler.
template <class T>
PYCOLL_HD void prefetch_block(const CombineArgs& a, size_t at) {
  for (int k = 0; k < a.src_count && k < kFanIn; ++k) {
    if (kWidens<T> && !a.is_wire(k)) continue;
    constexpr size_t size = sizeof(Accumulator<T>);
    const auto* const begin = static_cast<const std::byte*>(a.src[k]) + at * size;
    for (size_t i = 0; i < kBlock<T> * size; i += 64) __builtin_prefetch(begin + i);
  }
}

template <class T, ReduceOp Op>
void combine(const CombineArgs& a) {
  constexpr bool kRoundsInLoop = kWidens<T> && kConvertsInLoop<T>;
  const bool in_one_loop = kRoundsInLoop && a.final && a.wire_sources == 0 && a.src_count <= kFanIn;
  const size_t size = a.final ? sizeof(T) : sizeof(Accumulator<T>);
  for (size_t at = 0; at < a.count; at += kBlock<T>) {
    const size_t n = a.count - at < kBlock<T> ? a.count - at : kBlock<T>;
    void* const dst = static_cast<std::byte*>(a.dst[0]) + at * size;
    if (at + 2 * kBlock<T> <= a.count) prefetch_block<T>(a, at + kBlock<T>);
    if (in_one_loop) {
      const void* src[kFanIn];
      for (int k = 0; k < a.src_count; ++k) src[k] = static_cast<const std::byte*>(a.src[k]) + at * sizeof(T);
      if constexpr (kRoundsInLoop) reduce_few<T, Op, true>(dst, src, a.src_count, n, a.world);
    } else {
      reduce_block<T, Op>(dst, a, at, n);
    }
    for (int d = 1; d < a.dst_count; ++d) copy(static_cast<std::byte*>(a.dst[d]) + at * size, dst, n * size);
  }
}

void quantize(const void* values, float* residual, int8_t* elements, float* scale) {
  alignas(64) float x[kScaleBlock];
  int32_t largest_bits = 0;  // as integers magnitudes have the same order, and NaNs are above infinity
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < kScaleBlock; ++i) x[i] = load<float>(values, i) + (residual != nullptr ? residual[i] : 0);
  for (size_t i = 0; i < kScaleBlock; ++i) {
    const int32_t bits = static_cast<int32_t>(__builtin_bit_cast(uint32_t, x[i]) & 0x7fffffff);
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float largest = __builtin_bit_cast(float, largest_bits);
  const float steps = steps_per_one(largest), step = steps != 0 ? worth_of_step(largest) : 0.0f;
  if (largest_bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
    __builtin_memset(elements, 1, kScaleBlock);
    return;
  }
  *scale = step;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < kScaleBlock; ++i) elements[i] = static_cast<int8_t>(nearest(x[i] * steps));
  if (residual == nullptr) return;
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < kScaleBlock; ++i) residual[i] = x[i] - static_cast<float>(elements[i]) * step;
}

void dequantize(const Int8Unit& unit, float* to) {
  for (size_t block = 0; block < kScales; ++block) {
    const float scale = unit.scales[block];
    const int8_t* const elements = unit.elements + block * kScaleBlock;
    PYCOLL_INDEPENDENT
    for (size_t i = 0; i < kScaleBlock; ++i) to[block * kScaleBlock + i] = static_cast<float>(elements[i]) * scale;
  }
}

template <class T, ReduceOp... Ops>
constexpr void fill_row(Kernels& table, DType dtype) {
  ((table.combine[static_cast<int>(dtype)][static_cast<int>(Ops)] = combine<T, Ops>), ...);
}

template <class T>
constexpr void fill(Kernels& table, DType dtype) {
  fill_row<T, ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProduct>(table, dtype);
  if constexpr (std::is_integral_v<T>) {
    fill_row<T, ReduceOp::kBand, ReduceOp::kBor, ReduceOp::kBxor>(table, dtype);
  }
}

constexpr Kernels make_table() {
  Kernels table{};
  table.copy = copy;
  table.stream = stream;
  table.drain = Streams::drain;
  table.quantize = quantize;
  table.dequantize = dequantize;
  table.isa = kIsa;
  fill<float>(table, DType::kFloat32);
  fill<double>(table, DType::kFloat64);
  fill<Float16>(table, DType::kFloat16);
  fill<BFloat16>(table, DType::kBFloat16);
  fill<int8_t>(table, DType::kInt8);
  fill<int16_t>(table, DType::kInt16);
  fill<int32_t>(table, DType::kInt32);
  fill<int64_t>(table, DType::kInt64);
  fill<uint8_t>(table, DType::kUInt8);
  return table;
}

}  // namespace
}  // namespace pycoll::cpu
