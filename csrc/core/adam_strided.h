// core/adam_math.h on a piece of a tensor, by threads that share it: the portable loops, for CUDA blocks and for host
// threads that stand in for a block. The CPU's own loops (cpu/adam.h) give the same bits.
#pragma once

#include "core/adam_math.h"
#include "core/combine.h"

namespace pycoll {

// Elements `first` to `first + count` of a tensor, updated in place.
struct AdamPiece {
  void* param;
  const void* grad;
  float* master;  // of a 16-bit parameter, or null
  float* exp_avg;
  float* exp_avg_sq;
  float* max_exp_avg_sq;  // null: no AMSGrad
  size_t count;
  uint64_t first;
  bool stochastic;
};

namespace strided {

// N elements of fp32 state: N is more than fits a vector where parameter or gradient is narrower.
template <size_t N>
PYCOLL_HD void load_floats(float (&values)[N], const float* base, size_t index) {
  const void* from = base + index;
  __builtin_memcpy(values, __builtin_assume_aligned(from, kAlignment<float, N>), sizeof values);
}
template <size_t N>
PYCOLL_HD void store_floats(float* base, size_t index, const float (&values)[N]) {
  void* to = base + index;
  __builtin_memcpy(__builtin_assume_aligned(to, kAlignment<float, N>), values, sizeof values);
}

// The parameter as fp32 before a step, and its new value afterwards.
template <class P, size_t N>
PYCOLL_HD void load_param(float (&values)[N], const AdamPiece& a, size_t index) {
  if (kWidens<P> && a.master != nullptr) return load_floats(values, a.master, index);
  P elements[N];
  load(elements, a.param, index);
  for (size_t j = 0; j < N; ++j) values[j] = widen(elements[j]);
}
template <class P, size_t N>
PYCOLL_HD void store_param(const AdamPiece& a, size_t index, const float (&values)[N], const uint32_t (&key)[2]) {
  P elements[N];
  if constexpr (kWidens<P>) {
    if (a.master != nullptr) store_floats(a.master, index, values);
    for (size_t j = 0; j < N; ++j) {
      elements[j] =
          a.stochastic ? round_at_random<P>(values[j], random_bits(key, a.first + index + j)) : narrow<P>(values[j]);
    }
  } else {
    for (size_t j = 0; j < N; ++j) elements[j] = values[j];
  }
  store(a.param, index, elements);
}

template <class P, class G, bool kAmsgrad, size_t N>
PYCOLL_HD void adam_at(const AdamPiece& a, const AdamScalars& s, size_t index) {
  float param[N], exp_avg[N], exp_avg_sq[N], most[N] = {};
  G grad[N];
  load(grad, a.grad, index);
  load_param<P>(param, a, index);
  load_floats(exp_avg, a.exp_avg, index);
  load_floats(exp_avg_sq, a.exp_avg_sq, index);
  if constexpr (kAmsgrad) load_floats(most, a.max_exp_avg_sq, index);
  for (size_t j = 0; j < N; ++j) {
    AdamMoments moments{exp_avg[j], exp_avg_sq[j], most[j]};
    param[j] = adam_update<kAmsgrad>(s, param[j], widen(grad[j]), moments);
    exp_avg[j] = moments.exp_avg;
    exp_avg_sq[j] = moments.exp_avg_sq;
    most[j] = moments.max_exp_avg_sq;
  }
  store_param<P>(a, index, param, s.key);
  store_floats(a.exp_avg, index, exp_avg);
  store_floats(a.exp_avg_sq, index, exp_avg_sq);
  if constexpr (kAmsgrad) store_floats(a.max_exp_avg_sq, index, most);
}

// Whether arrays of P, G and float can be read in whole vectors from the piece's first element on.
template <class P, class G>
PYCOLL_HD bool all_aligned(const AdamPiece& a) {
  uintptr_t bits = 0;
  for (const void* p : {static_cast<const void*>(a.param), a.grad, static_cast<const void*>(a.master),
                        static_cast<const void*>(a.exp_avg), static_cast<const void*>(a.exp_avg_sq),
                        static_cast<const void*>(a.max_exp_avg_sq)}) {
    bits |= reinterpret_cast<uintptr_t>(p);
  }
  return bits % kVectorBytes == 0;
}

template <class P, class G, bool kAmsgrad, class Group>
PYCOLL_HD void adam_pieces(const Group& g, const AdamPiece& a, const AdamScalars& s) {
  constexpr size_t kN = kVector<P> > kVector<G> ? kVector<P> : kVector<G>;
  const size_t vectors = all_aligned<P, G>(a) ? a.count / kN : 0;
  for (size_t v = g.thread(); v < vectors; v += g.size()) adam_at<P, G, kAmsgrad, kN>(a, s, v * kN);
  for (size_t i = vectors * kN + g.thread(); i < a.count; i += g.size()) adam_at<P, G, kAmsgrad, 1>(a, s, i);
}

}  // namespace strided

// The share of thread g.thread() of the g.size() threads that call this together.
template <class P, class G, class Group>
PYCOLL_HD void adam_strided(const Group& g, const AdamPiece& a, const AdamScalars& s) {
  if (a.max_exp_avg_sq != nullptr) return strided::adam_pieces<P, G, true>(g, a, s);
  strided::adam_pieces<P, G, false>(g, a, s);
}

// That thread's share of the sum of squares of n elements, in fp64: not finite if and only if one of them is not.
template <class T, class Group>
PYCOLL_HD double squares_strided(const Group& g, const void* data, size_t n) {
  constexpr size_t kN = strided::kVector<T>;
  const size_t vectors = reinterpret_cast<uintptr_t>(data) % strided::kVectorBytes == 0 ? n / kN : 0;
  double sum = 0;
  for (size_t v = g.thread(); v < vectors; v += g.size()) {
    T elements[kN];
    strided::load(elements, data, v * kN);
    for (size_t j = 0; j < kN; ++j) sum += static_cast<double>(widen(elements[j])) * widen(elements[j]);
  }
  for (size_t i = vectors * kN + g.thread(); i < n; i += g.size()) {
    T element[1];
    strided::load(element, data, i);
    sum += static_cast<double>(widen(element[0])) * widen(element[0]);
  }
  return sum;
}

}  // namespace pycoll
