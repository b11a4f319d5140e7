// cpu/bucket.h over real communicators, ranks as threads: packing of every dtype into every wire, averages and sums of
// squares against fp64, updates against the same update of the whole bucket by one rank, all ranks' memory after them; the
// 8-bit format at its edges, alike for all instruction sets.
#include "cpu/bucket.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "cpu/adam.h"
#include "cpu/kernels.h"
#include "ranks.h"

using namespace pycoll;
using cpu::Shard;

namespace {

constexpr Wire kWires[] = {Wire::kFloat32, Wire::kFloat16, Wire::kBFloat16, Wire::kInt8};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr size_t kCounts[] = {0, 1, 255, 257, 3000};  // of a bucket's parameters
constexpr size_t kParams = std::size(kCounts);

size_t first_of(size_t param) {
  size_t at = 0;
  for (size_t k = 0; k < param; ++k) at += (kCounts[k] + kScaleBlock - 1) / kScaleBlock * kScaleBlock;
  return at;
}

// Whole units that ranks share equally.
size_t units_for(int world) {
  const size_t ranks = static_cast<size_t>(world), units = (first_of(kParams) + kUnit - 1) / kUnit;
  return (units + ranks - 1) / ranks * ranks;
}

std::vector<float> random_floats(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& v : values) v = normal(random);
  return values;
}

// Gradient `param` of a rank, as elements of `dtype`, and what they are worth.
struct Gradient {
  std::vector<std::byte> bytes;
  std::vector<float> values;
};
Gradient gradient(int rank, size_t param, DType dtype) {
  Gradient g{{}, random_floats(kCounts[param], static_cast<unsigned>(rank) * 100 + static_cast<unsigned>(param) + 1)};
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    g.bytes.resize(g.values.size() * sizeof(T) + 1);
    for (size_t i = 0; i < g.values.size(); ++i) {
      const T element = narrow<T>(static_cast<Accumulator<T>>(g.values[i]));
      std::memcpy(g.bytes.data() + i * sizeof(T), &element, sizeof(T));
      g.values[i] = static_cast<float>(widen(element));
    }
  });
  return g;
}

// A wire as fp32, by the format's definition.
std::vector<float> decoded(Wire wire, const std::byte* memory, size_t units) {
  std::vector<float> values(units * kUnit);
  for (size_t i = 0; i < values.size(); ++i) {
    if (wire == Wire::kInt8) {
      const Int8Unit& unit = reinterpret_cast<const Int8Unit*>(memory)[i / kUnit];
      values[i] = static_cast<float>(unit.elements[i % kUnit]) * unit.scales[i % kUnit / kScaleBlock];
    } else {
      dispatch_dtype(dtype_of(wire), [&](auto tag) {
        using T = typename decltype(tag)::type;
        T element;
        std::memcpy(&element, memory + i * sizeof(T), sizeof(T));
        values[i] = static_cast<float>(widen(element));
      });
    }
  }
  return values;
}

// What a wire may take from an element.
double lost_at_most(Wire wire, float value, float largest) {
  switch (wire) {
    case Wire::kFloat32:
      return 0;
    case Wire::kFloat16:
      return std::max(std::abs(value) * 0x1p-11, 0x1p-25);
    case Wire::kBFloat16:
      return std::abs(value) * 0x1p-8;
    case Wire::kInt8:
      return largest / 127 * 0.5001;
  }
  return 0;
}

// This rank's wire in its heap, packed; parameter 2 has no gradient on odd ranks.
std::shared_ptr<void> packed(cpu::Communicator& comm, const Shard& shard, DType dtype) {
  const size_t bytes = shard.units * unit_bytes(shard.wire);
  std::shared_ptr<void> memory = comm.allocate(bytes);
  std::memset(memory.get(), 0, bytes);
  for (size_t k = 0; k < kParams; ++k) {
    const Gradient g = gradient(shard.rank, k, dtype);
    const bool missing = k == 2 && shard.rank % 2 == 1;
    // In two pieces, as threads would.
    const size_t half = std::min(kCounts[k], kScaleBlock);
    for (const auto& [begin, end] : {std::pair<size_t, size_t>{0, half}, {half, kCounts[k]}}) {
      const void* grad = missing ? nullptr : g.bytes.data() + begin * size_of(dtype);
      cpu::pack(shard.wire, grad, dtype, first_of(k) + begin, end - begin, memory.get(), nullptr,
                /*streams=*/begin == 0);
    }
    const std::vector<float> values = decoded(shard.wire, static_cast<std::byte*>(memory.get()), shard.units);
    for (size_t i = 0; i < kCounts[k]; ++i) {
      const size_t block = i / kScaleBlock * kScaleBlock;
      float largest = 0;
      for (size_t j = block; j < std::min(block + kScaleBlock, kCounts[k]); ++j) {
        largest = std::max(largest, std::abs(g.values[j]));
      }
      const float expected = missing ? 0 : g.values[i];
      CHECK(std::abs(values[first_of(k) + i] - expected) <= lost_at_most(shard.wire, expected, largest));
    }
  }
  return memory;
}

struct Reduce : cpu::ShardWork {
  Shard shard;
  mutable std::vector<double> squares;
  explicit Reduce(const Shard& shard) : shard(shard), squares(shard.size()) {}
  void run(const void* const* in, void* const* out) const override {
    const size_t middle = shard.size() / 2;
    cpu::reduce_units(shard, in, out, squares.data(), middle, shard.size());
    cpu::reduce_units(shard, in, out, squares.data(), 0, middle);
  }
};

cpu::Call call_of(Collective collective, const Shard& shard, const void* in, void* out, const cpu::ShardWork& work) {
  cpu::Call call{.collective = collective, .dtype = DType::kFloat32};
  call.in = in;
  call.out = out;
  call.count = shard.units * kUnit;
  call.work = &work;
  return call;
}

// The average of all ranks' wires, in fp64 and as it must be.
std::vector<float> check_average(cpu::Communicator& comm, const Shard& shard, const void* wire, const float* grads,
                                 const std::vector<double>& squares) {
  const size_t n = shard.units * kUnit;
  const std::vector<float> own = decoded(shard.wire, static_cast<const std::byte*>(wire), shard.units);
  std::vector<float> all(n * static_cast<size_t>(shard.world)), averages(n);
  comm.run({.collective = Collective::kAllGather,
            .dtype = DType::kFloat32,
            .in = own.data(),
            .out = all.data(),
            .count = n});
  double sum_of_squares = 0;
  for (size_t i = 0; i < n; ++i) {
    float sum = all[i];
    for (size_t r = 1; r < static_cast<size_t>(shard.world); ++r) sum += all[r * n + i];
    averages[i] = sum / static_cast<float>(shard.world);
    CHECK_EQ(grads[i], averages[i]);
    if (i / kUnit / shard.size() == static_cast<size_t>(shard.rank)) {
      sum_of_squares += static_cast<double>(averages[i]) * averages[i];
    }
  }
  double found = 0;
  for (const double s : squares) found += s;
  CHECK(std::abs(found - sum_of_squares) <= 1e-12 * sum_of_squares);
  return averages;
}

struct Update : cpu::ShardWork {
  Shard shard;
  cpu::AdamState state;
  std::vector<cpu::Segment> segments;
  void run(const void* const* in, void* const* out) const override {
    const size_t middle = shard.size() / 2;
    cpu::update_units(shard, in, out, state, segments, middle, shard.size());
    cpu::update_units(shard, in, out, state, segments, 0, middle);
  }
};

// Of the whole bucket, or of a shard.
struct State {
  std::vector<float> master, exp_avg, exp_avg_sq, most;
  State(size_t n, size_t from, const std::vector<float>& params)
      : master(params.begin() + static_cast<long>(from), params.begin() + static_cast<long>(from + n)),
        exp_avg(n, 0.25f),
        exp_avg_sq(n, 0.5f),
        most(n, 0.75f) {}
  cpu::AdamState pointers(DType dtype) {
    return {dtype, master.data(), exp_avg.data(), exp_avg_sq.data(), most.data()};
  }
};

// All parameters but number 3, by rules of their own.
std::vector<cpu::Segment> segments(DType dtype) {
  std::vector<cpu::Segment> made;
  for (size_t k = 0; k < kParams; ++k) {
    if (k == 3) continue;
    const AdamSettings settings{1e-2 * static_cast<double>(k + 1), 0.9, 0.95, 1e-8, 0.1, k % 2 == 0, false};
    made.push_back({first_of(k), first_of(k) + kCounts[k], 1000 * k, adam_scalars(settings, 3, 0.5, 0),
                    dtype != DType::kFloat32 && k != 4, k == 1, k == 4});
  }
  return made;
}

// One rank's update of the whole, by a shard of all: what a sharded one must give.
void check_update(cpu::Communicator& comm, const Shard& shard, const void* wire, const std::vector<float>& averages,
                  DType dtype) {
  const size_t n = shard.units * kUnit, bytes = n * size_of(dtype);
  const std::shared_ptr<void> params = comm.allocate(bytes);
  std::vector<float> values = random_floats(n, 7);
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (size_t i = 0; i < n; ++i) {
      const T value = narrow<T>(static_cast<Accumulator<T>>(values[i]));
      std::memcpy(static_cast<std::byte*>(params.get()) + i * sizeof(T), &value, sizeof(T));
      values[i] = static_cast<float>(widen(value));
    }
  });
  std::vector<std::byte> expected(bytes);
  std::memcpy(expected.data(), params.get(), bytes);
  State whole(n, 0, values), own(shard.size() * kUnit, shard.first() * kUnit, values);
  const Shard alone{Wire::kFloat32, 0, 1, shard.units};
  const void* in = averages.data();
  void* out = expected.data();
  cpu::update_units(alone, &in, &out, whole.pointers(dtype), segments(dtype), 0, shard.units);

  Update work;
  work.shard = shard;
  work.state = own.pointers(dtype);
  work.segments = segments(dtype);
  comm.run(call_of(Collective::kUpdateBucket, shard, wire, params.get(), work));
  CHECK(std::memcmp(params.get(), expected.data(), bytes) == 0);
  const auto part_of = [&](const std::vector<float>& all) {
    const auto begin = all.begin() + static_cast<long>(shard.first() * kUnit);
    return std::vector<float>(begin, begin + static_cast<long>(shard.size() * kUnit));
  };
  CHECK(own.exp_avg == part_of(whole.exp_avg) && own.exp_avg_sq == part_of(whole.exp_avg_sq));
  CHECK(own.master == part_of(whole.master) && own.most == part_of(whole.most));
}

void check_buckets(int world) {
  const auto errors = run_ranks(world, small_config(), Milliseconds(60000), [](cpu::Communicator& comm) {
    for (const Wire wire : kWires) {
      for (const DType dtype : kDTypes) {
        const Shard shard{wire, comm.rank(), comm.world(), units_for(comm.world()), /*streams=*/comm.rank() % 2 == 1};
        const std::shared_ptr<void> memory = packed(comm, shard, dtype);
        const std::shared_ptr<void> grads =
            wire == Wire::kFloat32 ? memory : comm.allocate(shard.units * kUnit * sizeof(float));
        const std::vector<std::byte> before(static_cast<std::byte*>(memory.get()),
                                            static_cast<std::byte*>(memory.get()) + shard.units * unit_bytes(wire));
        Reduce measure(shard), reduce(shard);
        comm.run(call_of(Collective::kMeasureBucket, shard, memory.get(), nullptr, measure));
        CHECK(std::memcmp(before.data(), memory.get(), before.size()) == 0);
        comm.run(call_of(Collective::kReduceBucket, shard, memory.get(), grads.get(), reduce));
        CHECK(measure.squares == reduce.squares);
        if (wire != Wire::kFloat32) CHECK(std::memcmp(before.data(), memory.get(), before.size()) == 0);
        const auto* reduced = static_cast<const float*>(grads.get());
        std::vector<float> averages(reduced, reduced + shard.units * kUnit);
        comm.run({.collective = Collective::kBarrier});  // all have looked
        std::memcpy(memory.get(), before.data(), before.size());
        averages = check_average(comm, shard, before.data(), averages.data(), reduce.squares);
        check_update(comm, shard, memory.get(), averages, dtype);
      }
    }
  });
  for (const std::string& error : errors) CHECK_EQ(error, "");
}

// A rank that is in another pass, or makes another call of its bucket.
void check_mismatch() {
  for (const bool other_call : {false, true}) {
    const auto errors = run_ranks(2, small_config(), Milliseconds(60000), [&](cpu::Communicator& comm) {
      const Shard shard{Wire::kFloat32, comm.rank(), 2, 2};
      const std::shared_ptr<void> memory = comm.allocate(shard.units * unit_bytes(shard.wire));
      const Reduce work(shard);
      const bool odd = comm.rank() == 1;
      cpu::Call call = call_of(odd && other_call ? Collective::kMeasureBucket : Collective::kReduceBucket, shard,
                               memory.get(), memory.get(), work);
      call.shape = odd && !other_call ? 2 : 1;
      comm.run(call);
    });
    for (const std::string& error : errors) {
      CHECK(error.find(other_call ? "measure_bucket(" : "shape or element type") != std::string::npos);
    }
  }
  const auto errors = run_ranks(1, small_config(), Milliseconds(60000), [&](cpu::Communicator& comm) {
    const Shard shard{Wire::kFloat32, 0, 1, 1};
    std::vector<float> elsewhere(kUnit);
    const Reduce work(shard);
    comm.run(call_of(Collective::kReduceBucket, shard, elsewhere.data(), elsewhere.data(), work));
  });
  CHECK(errors[0].find("must come from") != std::string::npos);
}

// One block: what it becomes, its scale, and what is left over; the same for all instruction sets.
struct Quantized {
  std::vector<int8_t> elements = std::vector<int8_t>(kScaleBlock);
  std::vector<float> residual;
  float scale = -1;
};
Quantized quantized(const std::vector<float>& values, const std::vector<float>& residual) {
  std::vector<Quantized> all;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    const cpu::Kernels* kernels = cpu::kernels_for(isa);
    if (kernels == nullptr) continue;
    Quantized q;
    q.residual = residual;
    kernels->quantize(values.data(), q.residual.empty() ? nullptr : q.residual.data(), q.elements.data(), &q.scale);
    all.push_back(q);
    CHECK(q.elements == all[0].elements);
    CHECK(std::memcmp(&q.scale, &all[0].scale, sizeof q.scale) == 0);
    CHECK(q.residual == all[0].residual);
  }
  return all[0];
}

void check_int8() {
  const float kTiny = std::numeric_limits<float>::denorm_min(), kHuge = std::numeric_limits<float>::max();
  const std::vector<float> zeros(kScaleBlock);
  for (const float largest : {0.0f, kTiny, 1e-38f, 1e-30f, 1.0f, 3e38f, kHuge}) {
    std::vector<float> values = random_floats(kScaleBlock, 5);
    for (float& v : values) v = std::clamp(v / 8, -1.0f, 1.0f) * largest;
    values[17] = largest;
    const Quantized q = quantized(values, zeros);
    CHECK(std::isfinite(q.scale));
    for (size_t i = 0; i < kScaleBlock; ++i) {
      const float back = static_cast<float>(q.elements[i]) * q.scale;
      CHECK(std::abs(q.elements[i]) <= 127);
      CHECK_EQ(q.residual[i], values[i] - back);
      if (largest >= 1e-30f) CHECK(std::abs(q.residual[i]) <= q.scale * 0.5001);
    }
  }
  for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> values = random_floats(kScaleBlock, 6), residual = random_floats(kScaleBlock, 8);
    values[200] = bad;
    const Quantized q = quantized(values, residual);
    CHECK(std::isnan(q.scale));
    CHECK(q.residual == residual);  // the step will be skipped: nothing was sent
    CHECK(std::all_of(q.elements.begin(), q.elements.end(), [](int8_t e) { return e != 0; }));  // NaNs all
  }
  // What is sent is what there was, but for what is left over at the end.
  std::vector<float> residual = zeros;
  std::vector<double> given(kScaleBlock), sent(kScaleBlock);
  for (unsigned step = 0; step < 50; ++step) {
    const std::vector<float> values = random_floats(kScaleBlock, 50 + step);
    const Quantized q = quantized(values, residual);
    residual = q.residual;
    for (size_t i = 0; i < kScaleBlock; ++i) {
      given[i] += values[i];
      sent[i] += static_cast<double>(static_cast<float>(q.elements[i]) * q.scale);
    }
  }
  for (size_t i = 0; i < kScaleBlock; ++i) CHECK(std::abs(given[i] - sent[i] - residual[i]) < 1e-5);
  CHECK_EQ(quantized(zeros, {}).scale, 0);
}

}  // namespace

int main() {
  check_int8();
  for (const int world : {1, 2, 3, 4, 7}) check_buckets(world);
  check_mismatch();
  return check::report();
}
