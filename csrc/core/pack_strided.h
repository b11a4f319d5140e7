// Gradients into a wire (core/wire.h), and 8-bit wires averaged, by threads that share the work: the portable loops, for
// CUDA blocks and for host threads that stand in for one. The CPU's own (cpu/bucket.h) give the same bits.
#pragma once

#include "core/combine.h"
#include "core/wire.h"

namespace pycoll {

// Elements `first` to `first + count` of a bucket; `first` is a multiple of kScaleBlock.
struct PackPiece {
  const void* grad;  // in memory order; null: zeros
  void* wire;        // the bucket's, from its first element on
  float* residual;   // the bucket's, for 8 bits, or null
  size_t first, count;
};

namespace strided {

constexpr size_t kPart = 8;  // elements of a scale block that a thread takes at once
constexpr size_t kParts = kScaleBlock / kPart;

// As integers magnitudes have the same order, and NaNs are above infinity.
PYCOLL_HD int32_t magnitude_bits(float x) { return static_cast<int32_t>(__builtin_bit_cast(uint32_t, x) & 0x7fffffff); }

PYCOLL_HD bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000; }

PYCOLL_HD bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// `Count` times N elements, `step` elements apart. A factor, even of 1, would make signalling NaNs quiet.
template <class G, class W, size_t N, int Count>
PYCOLL_HD bool pack_at(const void* grad, void* to, const float* factor, size_t index, size_t step) {
  G elements[Count][N];
  for (int c = 0; c < Count; ++c) load(elements[c], grad, index + c * step);
  bool finite = true;
  for (int c = 0; c < Count; ++c) {
    W packed[N];
    for (size_t j = 0; j < N; ++j) {
      if constexpr (std::is_same_v<G, W>) {
        packed[j] = factor == nullptr ? elements[c][j] : narrow<W>(widen(elements[c][j]) * *factor);
      } else {
        const float value = widen(elements[c][j]);
        packed[j] = narrow<W>(factor == nullptr ? value : value * *factor);
      }
      finite &= is_finite(widen(packed[j]));
    }
    store(to, index + c * step, packed);
  }
  return finite;
}

// The part of a scale block that begins at `index`, as fp32, zeros where the gradient has ended.
template <class G>
PYCOLL_HD void load_part(float (&values)[kPart], const PackPiece& p, const float* factor, size_t index) {
  G elements[kPart] = {};
  if (index + kPart <= p.count && is_aligned(p.grad, kVectorBytes)) {
    load(elements, p.grad, index);
  } else {
    for (size_t j = 0; j < kPart && index + j < p.count; ++j) {
      G element[1];
      load(element, p.grad, index + j);
      elements[j] = element[0];
    }
  }
  for (size_t j = 0; j < kPart; ++j) {
    values[j] = factor == nullptr ? widen(elements[j]) : widen(elements[j]) * *factor;
  }
}

PYCOLL_HD void store_part(int8_t* to, const int8_t (&elements)[kPart]) {
  __builtin_memcpy(__builtin_assume_aligned(to, kPart), elements, sizeof elements);
}

// A scale block, from element `begin` of the piece on, by the Group::kThreads threads of `g`.
template <class G, class Group>
PYCOLL_HD bool pack_block(const Group& g, const PackPiece& p, const float* factor, size_t begin) {
  constexpr size_t kMine = kParts / Group::kThreads;
  Int8Unit& unit = static_cast<Int8Unit*>(p.wire)[(p.first + begin) / kUnit];
  const size_t place = (p.first + begin) % kUnit;
  float* const residual = p.residual == nullptr ? nullptr : p.residual + p.first + begin;
  float x[kMine][kPart];
  int32_t largest_bits = 0;
  for (size_t m = 0; m < kMine; ++m) {
    const size_t part = (m * Group::kThreads + g.thread()) * kPart;
    float left[kPart] = {};
    if (residual != nullptr) load(left, residual, part);
    load_part<G>(x[m], p, factor, begin + part);
    for (size_t j = 0; j < kPart; ++j) {
      x[m][j] += left[j];
      const int32_t bits = magnitude_bits(x[m][j]);
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
  }
  largest_bits = g.largest(largest_bits);
  const bool finite = largest_bits < 0x7f800000;
  const float largest = __builtin_bit_cast(float, largest_bits), steps = steps_per_one(largest);
  const float step = steps != 0 ? worth_of_step(largest) : 0.0f;
  if (g.thread() == 0) unit.scales[place / kScaleBlock] = finite ? step : __builtin_nanf("");
  for (size_t m = 0; m < kMine; ++m) {
    const size_t part = (m * Group::kThreads + g.thread()) * kPart;
    int8_t elements[kPart];
    for (size_t j = 0; j < kPart; ++j) elements[j] = finite ? static_cast<int8_t>(nearest(x[m][j] * steps)) : int8_t{1};
    store_part(unit.elements + place + part, elements);
    if (residual == nullptr || !finite) continue;
    for (size_t j = 0; j < kPart; ++j) x[m][j] -= static_cast<float>(elements[j]) * step;
    store(residual, part, x[m]);
  }
  return finite;
}

}  // namespace strided

// The share of thread g.thread() of the g.size() threads that call this together, in a wire of floats: whether all it has
// packed is finite there. `factor`: what gradients are multiplied by; null: nothing.
template <class G, class W, class Group>
PYCOLL_HD bool pack_strided(const Group& g, const PackPiece& p, const float* factor) {
  constexpr size_t kN = strided::kVector<G> > strided::kVector<W> ? strided::kVector<G> : strided::kVector<W>;
  void* const to = static_cast<std::byte*>(p.wire) + p.first * sizeof(W);
  const bool aligned =
      strided::is_aligned(p.grad, strided::kVectorBytes) && strided::is_aligned(to, strided::kVectorBytes);
  const size_t vectors = aligned ? p.count / kN : 0, threads = g.size();
  constexpr int kInFlight = 4;
  bool finite = true;
  size_t v = g.thread();
  for (; v + (kInFlight - 1) * threads < vectors; v += kInFlight * threads) {
    finite &= strided::pack_at<G, W, kN, kInFlight>(p.grad, to, factor, v * kN, threads * kN);
  }
  for (; v < vectors; v += threads) finite &= strided::pack_at<G, W, kN, 1>(p.grad, to, factor, v * kN, 0);
  for (size_t i = vectors * kN + g.thread(); i < p.count; i += threads) {
    finite &= strided::pack_at<G, W, 1, 1>(p.grad, to, factor, i, 0);
  }
  return finite;
}

// The same in 8 bits, by group g.index() of g.groups(): the Group::kThreads (a divisor of 32) threads of a group share
// scale blocks, of which g.largest(x) is the largest x that any has given. Wire and residual are aligned to 16 bytes.
template <class G, class Group>
PYCOLL_HD bool pack_int8_strided(const Group& g, const PackPiece& p, const float* factor) {
  bool finite = true;
  for (size_t begin = g.index() * kScaleBlock; begin < p.count; begin += g.groups() * kScaleBlock) {
    finite &= strided::pack_block<G>(g, p, factor, begin);
  }
  return finite;
}

// What a piece without a gradient becomes.
template <class Group>
PYCOLL_HD void pack_zeros(const Group& g, Wire wire, const PackPiece& p) {
  if (wire == Wire::kInt8) {
    const size_t parts = (p.count + kScaleBlock - 1) / kScaleBlock * strided::kParts;
    for (size_t part = g.thread(); part < parts; part += g.size()) {
      Int8Unit& unit = static_cast<Int8Unit*>(p.wire)[(p.first + part * strided::kPart) / kUnit];
      const size_t place = (p.first + part * strided::kPart) % kUnit;
      strided::store_part(unit.elements + place, {});
      if (place % kScaleBlock == 0) unit.scales[place / kScaleBlock] = 0;
    }
    return;
  }
  const size_t halves = size_of(dtype_of(wire)) / sizeof(uint16_t);
  void* const to = static_cast<std::byte*>(p.wire) + p.first * halves * sizeof(uint16_t);
  constexpr size_t kN = strided::kVector<uint16_t>;
  const size_t n = p.count * halves, vectors = strided::is_aligned(to, strided::kVectorBytes) ? n / kN : 0;
  for (size_t v = g.thread(); v < vectors; v += g.size()) strided::store<uint16_t, kN>(to, v * kN, {});
  for (size_t i = vectors * kN + g.thread(); i < n; i += g.size()) strided::store<uint16_t, 1>(to, i, {});
}

// That thread's share of the average of `world` wires in 8 bits of `units` units each, one after another: in rank order, in
// fp32, to `to`, which is aligned as they are.
template <class Group>
PYCOLL_HD void average_int8_strided(const Group& g, const Int8Unit* wires, int world, size_t units, float* to) {
  constexpr size_t kN = strided::kVector<float>;
  constexpr Reduce<ReduceOp::kAvg> kAverage;
  for (size_t v = g.thread(); v < units * kUnit / kN; v += g.size()) {
    const size_t unit = v * kN / kUnit, place = v * kN % kUnit;
    float sum[kN];
    for (int r = 0; r < world; ++r) {
      const Int8Unit& from = wires[static_cast<size_t>(r) * units + unit];
      const float scale = from.scales[place / kScaleBlock];
      int8_t elements[kN];
      __builtin_memcpy(elements, __builtin_assume_aligned(from.elements + place, kN), sizeof elements);
      for (size_t j = 0; j < kN; ++j) {
        const float value = static_cast<float>(elements[j]) * scale;
        sum[j] = r == 0 ? value : kAverage(sum[j], value);
      }
    }
    for (size_t j = 0; j < kN; ++j) sum[j] = kAverage.finalize(sum[j], world);
    strided::store(to, v * kN, sum);
  }
}

}  // namespace pycoll
