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
    constexpr size_t kTurn = 256;  // so few that processors read on while they are stored (see adam_body.h)
    alignas(64) std::byte block[kTurn * sizeof(float)];
    for (size_t at = 0; at < count; at += kTurn) {
      const size_t n = std::min(kTurn, count - at);
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
    const void* values = static_cast<const std::byte*>(grad) + at * size_of(dtype);
    alignas(64) float block[kScaleBlock];
    if (dtype != DType::kFloat32 || n < kScaleBlock) {  // else they are read where they lie: a copy took twice the time
      convert(DType::kFloat32, block, dtype, values, n);
      std::fill(block + n, block + kScaleBlock, 0.0f);
      values = block;
    }
    kernels().quantize(values, residual == nullptr ? nullptr : residual + first + at, unit.elements + place, &scale);
  }
}

// What the average over the ranks is taken of, in fp32, unit by unit: where the ranks' elements lie, decoded ones, or,
// of more ranks than a loop reads, the average.
class Sources {
 public:
  Sources(const Shard& shard, const void* const* wires)  // [world]
      : wire_(shard.wire), wires_(wires, static_cast<size_t>(shard.world)), places_(wires_.size()) {
    if (wire_ == Wire::kInt8) decoded_.resize(wires_.size() * kUnit);
    if (!few()) averages_.resize(kUnit);
  }
  DType dtype() const { return few() && wire_ != Wire::kInt8 ? dtype_of(wire_) : DType::kFloat32; }
  // [count] of `dtype`, good until the next call.
  std::span<const void* const> operator()(size_t unit) {
    for (size_t r = 0; r < wires_.size(); ++r) {
      places_[r] = static_cast<const std::byte*>(wires_[r]) + unit * unit_bytes(wire_);
      if (wire_ == Wire::kInt8) {
        kernels().dequantize(*static_cast<const Int8Unit*>(places_[r]), &decoded_[r * kUnit]);
        places_[r] = &decoded_[r * kUnit];
      }
    }
    if (few()) return places_;
    average();
    places_[0] = averages_.data();
    return std::span(places_).first(1);
  }

 private:
  bool few() const { return wires_.size() <= static_cast<size_t>(kMostGrads); }
  void average() {
    const int world = static_cast<int>(wires_.size());
    void* const to = averages_.data();
    const void* const sum = to;
    const auto& fp32 = kernels().combine[static_cast<int>(DType::kFloat32)];
    if (wire_ == Wire::kFloat32 || wire_ == Wire::kInt8) {
      return fp32[static_cast<int>(ReduceOp::kAvg)]({&to, 1, places_.data(), world, 0, true, world, kUnit});
    }
    const auto& row = kernels().combine[static_cast<int>(dtype_of(wire_))];
    row[static_cast<int>(ReduceOp::kSum)]({&to, 1, places_.data(), world, 0, false, world, kUnit});
    fp32[static_cast<int>(ReduceOp::kAvg)]({&to, 1, &sum, 1, 0, true, world, kUnit});
  }

  const Wire wire_;
  const std::span<const void* const> wires_;
  std::vector<const void*> places_;
  std::vector<float> decoded_;   // a unit of each rank, for 8 bits
  std::vector<float> averages_;  // a unit
};

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

void reduce_units(const Shard& shard, const void* const* in, void* const* out, double* squares, size_t from,
                  size_t to) {
  Sources sources(shard, in);
  const auto measure = adam_kernels().measure[static_cast<int>(sources.dtype())];
  alignas(64) float buffer[kUnit];
  const bool writes = out[shard.rank] != nullptr;
  const bool in_place = in[shard.rank] == out[shard.rank];  // then the averages' memory has just been read
  const auto put = shard.streams && !in_place ? kernels().stream : kernels().copy;
  for (size_t u = from; u < to; ++u) {
    const size_t unit = shard.first() + u;
    const auto place = [&](int r) { return static_cast<float*>(out[r]) + unit * kUnit; };
    float* const result = !writes ? nullptr : in_place ? place(shard.rank) : buffer;
    const auto ranks = sources(unit);
    squares[u] = measure(result, ranks.data(), static_cast<int>(ranks.size()), kUnit);
    for (int r = 0; writes && r < shard.world; ++r) {
      if (place(r) != result) put(place(r), result, sizeof buffer);
    }
  }
  kernels().drain();
}

void update_units(const Shard& shard, const void* const* in, void* const* out, const AdamState& state,
                  std::span<const Segment> segments, size_t from, size_t to) {
  Sources sources(shard, in);
  const auto update = adam_kernels().update[static_cast<int>(state.dtype)][static_cast<int>(sources.dtype())];
  const size_t element = size_of(state.dtype), grad_element = size_of(sources.dtype()), base = shard.first() * kUnit;
  std::vector<void*> dst(static_cast<size_t>(shard.world));
  const void* grads[kMostGrads];
  auto segment = std::lower_bound(segments.begin(), segments.end(), (shard.first() + from) * kUnit,
                                  [](const Segment& s, size_t at) { return s.end <= at; });
  for (size_t u = from; u < to; ++u) {
    const size_t begin = (shard.first() + u) * kUnit, end = begin + kUnit;
    while (segment != segments.end() && segment->end <= begin) ++segment;
    if (segment == segments.end()) break;
    if (segment->begin >= end) continue;
    const auto ranks = sources(shard.first() + u);
    for (auto s = segment; s != segments.end() && s->begin < end; ++s) {
      const size_t at = std::max(s->begin, begin), count = std::min(s->end, end) - at, mine = at - base;
      for (int i = 0; i < shard.world; ++i) {  // the own one first
        const int r = (shard.rank + i) % shard.world;
        dst[static_cast<size_t>(i)] = static_cast<std::byte*>(out[r]) + at * element;
      }
      for (size_t k = 0; k < ranks.size(); ++k) {
        grads[k] = static_cast<const std::byte*>(ranks[k]) + (at - begin) * grad_element;
      }
      update({dst[0], s->master ? state.master + mine : nullptr, dst.data(), shard.world, grads,
              static_cast<int>(ranks.size()), state.exp_avg + mine, state.exp_avg_sq + mine,
              s->amsgrad ? state.max_exp_avg_sq + mine : nullptr, count, s->first + (at - s->begin), s->stochastic,
              s->scalars, shard.streams});
    }
  }
  kernels().drain();
}

}  // namespace pycoll::cpu
