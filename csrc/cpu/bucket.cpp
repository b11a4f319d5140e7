#include "cpu/bucket.h"

#include <algorithm>
#include <cstring>

#include "cpu/adam.h"
#include "cpu/kernels.h"

namespace pycoll::cpu {

namespace {

static_assert(kAdamBlock == kUnit, "the sum of a unit's squares is that of one block");

// One source, cast: from accumulators (fp32) to elements of `dtype` where `narrows`, else the other way.
void cast(DType dtype, bool narrows, void* to, const void* from, size_t count) {
  const CombineArgs args{&to, 1, &from, 1, narrows ? 1u : 0u, narrows, 1, count};
  kernels().combine[static_cast<int>(dtype)][static_cast<int>(ReduceOp::kSum)](args);
}

void convert(DType to_dtype, void* to, DType from_dtype, const void* from, size_t count) {
  if (to_dtype == from_dtype) return kernels().copy(to, from, count * size_of(to_dtype));
  if (from_dtype == DType::kFloat32) return cast(to_dtype, /*narrows=*/true, to, from, count);
  if (to_dtype == DType::kFloat32) return cast(from_dtype, /*narrows=*/false, to, from, count);
  alignas(64) float wide[kUnit];
  for (size_t at = 0; at < count; at += kUnit) {
    const size_t n = std::min(kUnit, count - at);
    cast(from_dtype, false, wide, static_cast<const std::byte*>(from) + at * size_of(from_dtype), n);
    cast(to_dtype, true, static_cast<std::byte*>(to) + at * size_of(to_dtype), wide, n);
  }
}

// The same past the caches.
void stream_converted(DType to_dtype, std::byte* to, DType from_dtype, const std::byte* from, size_t count) {
  if (to_dtype == from_dtype) {
    kernels().stream(to, from, count * size_of(to_dtype));
  } else {
    alignas(64) std::byte block[kUnit * sizeof(float)];
    for (size_t at = 0; at < count; at += kUnit) {
      const size_t n = std::min(kUnit, count - at);
      convert(to_dtype, block, from_dtype, from + at * size_of(from_dtype), n);
      kernels().stream(to + at * size_of(to_dtype), block, n * size_of(to_dtype));
    }
  }
  kernels().drain();
}

void pack_int8(const void* grad, DType dtype, size_t first, size_t count, Int8Unit* units, float* residual) {
  for (size_t at = 0; at < count; at += kScaleBlock) {
    Int8Unit& unit = units[(first + at) / kUnit];
    const size_t place = (first + at) % kUnit;
    float& scale = unit.scales[place / kScaleBlock];
    if (grad == nullptr) {
      std::memset(unit.elements + place, 0, kScaleBlock);
      scale = 0;
      continue;
    }
    const size_t n = std::min(kScaleBlock, count - at);
    alignas(64) float values[kScaleBlock] = {};
    convert(DType::kFloat32, values, dtype, static_cast<const std::byte*>(grad) + at * size_of(dtype), n);
    kernels().quantize(values, residual == nullptr ? nullptr : residual + first + at, unit.elements + place, &scale);
  }
}

}  // namespace

void pack(Wire wire, const void* grad, DType dtype, size_t first, size_t count, void* to, float* residual,
          bool streams) {
  if (wire == Wire::kInt8) return pack_int8(grad, dtype, first, count, static_cast<Int8Unit*>(to), residual);
  const size_t element = size_of(dtype_of(wire));
  std::byte* const place = static_cast<std::byte*>(to) + first * element;
  if (grad == nullptr) {
    std::memset(place, 0, count * element);
  } else if (streams) {
    stream_converted(dtype_of(wire), place, dtype, static_cast<const std::byte*>(grad), count);
  } else {
    convert(dtype_of(wire), place, dtype, grad, count);
  }
}

Average::Average(const Shard& shard, const void* const* wires)
    : wire_(shard.wire), wires_(wires, static_cast<size_t>(shard.world)), sources_(wires_.size()) {
  if (wire_ == Wire::kInt8) decoded_.resize(wires_.size() * kUnit);
}

void Average::operator()(size_t unit, float* to) {
  for (size_t r = 0; r < wires_.size(); ++r) {
    sources_[r] = static_cast<const std::byte*>(wires_[r]) + unit * unit_bytes(wire_);
    if (wire_ == Wire::kInt8) {
      kernels().dequantize(*static_cast<const Int8Unit*>(sources_[r]), &decoded_[r * kUnit]);
      sources_[r] = &decoded_[r * kUnit];
    }
  }
  const int world = static_cast<int>(wires_.size());
  void* const dst = to;
  const auto& fp32 = kernels().combine[static_cast<int>(DType::kFloat32)];
  if (wire_ == Wire::kFloat32 || wire_ == Wire::kInt8) {
    return fp32[static_cast<int>(ReduceOp::kAvg)]({&dst, 1, sources_.data(), world, 0, true, world, kUnit});
  }
  const auto& row = kernels().combine[static_cast<int>(dtype_of(wire_))];
  row[static_cast<int>(ReduceOp::kSum)]({&dst, 1, sources_.data(), world, 0, false, world, kUnit});
  const void* const sum = to;
  fp32[static_cast<int>(ReduceOp::kAvg)]({&dst, 1, &sum, 1, 0, true, world, kUnit});
}

void reduce_units(const Shard& shard, const void* const* in, void* const* out, double* squares, size_t from,
                  size_t to) {
  Average average(shard, in);
  const auto sum_of_squares = adam_kernels().sum_of_squares[static_cast<int>(DType::kFloat32)];
  alignas(64) float buffer[kUnit];
  const bool in_place = in[shard.rank] == out[shard.rank];  // then the averages' memory has just been read
  const auto put = shard.streams && !in_place ? kernels().stream : kernels().copy;
  for (size_t u = from; u < to; ++u) {
    const size_t unit = shard.first() + u;
    const auto place = [&](int r) { return static_cast<float*>(out[r]) + unit * kUnit; };
    float* const result = in_place ? place(shard.rank) : buffer;
    average(unit, result);
    squares[u] = sum_of_squares(result, kUnit);
    for (int r = 0; out[shard.rank] != nullptr && r < shard.world; ++r) {
      if (place(r) != result) put(place(r), result, sizeof buffer);
    }
  }
  kernels().drain();
}

void update_units(const Shard& shard, const void* const* in, void* const* out, const AdamState& state,
                  std::span<const Segment> segments, size_t from, size_t to) {
  Average average(shard, in);
  const auto update = adam_kernels().update[static_cast<int>(state.dtype)][static_cast<int>(DType::kFloat32)];
  const size_t element = size_of(state.dtype), base = shard.first() * kUnit;
  std::vector<void*> dst(static_cast<size_t>(shard.world));
  alignas(64) float grad[kUnit];
  auto segment = std::lower_bound(segments.begin(), segments.end(), (shard.first() + from) * kUnit,
                                  [](const Segment& s, size_t at) { return s.end <= at; });
  for (size_t u = from; u < to; ++u) {
    const size_t begin = (shard.first() + u) * kUnit, end = begin + kUnit;
    while (segment != segments.end() && segment->end <= begin) ++segment;
    if (segment == segments.end()) break;
    if (segment->begin >= end) continue;
    average(shard.first() + u, grad);
    for (auto s = segment; s != segments.end() && s->begin < end; ++s) {
      const size_t at = std::max(s->begin, begin), count = std::min(s->end, end) - at, mine = at - base;
      for (int i = 0; i < shard.world; ++i) {  // the own one first
        const int r = (shard.rank + i) % shard.world;
        dst[static_cast<size_t>(i)] = static_cast<std::byte*>(out[r]) + at * element;
      }
      update({dst[0], s->master ? state.master + mine : nullptr, dst.data(), shard.world, grad + (at - begin),
              state.exp_avg + mine, state.exp_avg_sq + mine, s->amsgrad ? state.max_exp_avg_sq + mine : nullptr, count,
              s->first + (at - s->begin), s->stochastic, s->scalars, shard.streams});
    }
  }
  kernels().drain();
}

}  // namespace pycoll::cpu
