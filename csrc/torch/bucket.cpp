#include "torch/bucket.h"

#include <c10/util/hash.h>
#include <torch/extension.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/bucket.h"
#include "torch/adam.h"
#include "torch/block_list.h"
#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

Wire parse_wire(const std::string& text) {
  for (int w = 0; w < kWireCount; ++w) {
    if (text == name(static_cast<Wire>(w))) return static_cast<Wire>(w);
  }
  throw_usage("a wire is float32, float16, bfloat16 or int8, not " + text);
}

DType record_dtype(Wire w) { return w == Wire::kInt8 ? DType::kInt8 : dtype_of(w); }

void check_dense(const at::Tensor& t, const char* what, at::ScalarType type, size_t elements,
                 at::Device device = at::kCPU) {
  if (t.device() == device && t.is_contiguous() && t.scalar_type() == type &&
      static_cast<size_t>(t.numel()) == elements) {
    return;
  }
  throw_usage(c10::str("a bucket's ", what, " must be ", elements, " contiguous elements of ", type, " on ", device,
                       ", not ", t.numel(), " of ", t.scalar_type(), " on ", t.device()));
}

// What every work of a bucket has: its shard, and the tensors that it must keep.
struct BucketWork : cpu::ShardWork {
  BucketWork(Caller& caller, const std::string& wire_name, const at::Tensor& memory, bool streams) : memory(memory) {
    const Wire wire = parse_wire(wire_name);
    const Seat seat = caller.seat();
    shard = {wire, seat.rank, seat.world, memory.nbytes() / unit_bytes(wire), streams};
    check_dense(memory, "wire", memory.scalar_type(), shard.units * unit_bytes(wire) / memory.element_size());
    if (shard.units % static_cast<size_t>(seat.world) != 0) {
      throw_usage(c10::str("a bucket of ", shard.units, " units has no equal shards for ", seat.world, " ranks"));
    }
  }
  cpu::Call call(Collective collective, const at::Tensor& out, uint64_t tag) const {
    cpu::Call c{.collective = collective, .dtype = record_dtype(shard.wire)};
    c.in = memory.const_data_ptr();
    c.out = out.defined() ? out.mutable_data_ptr() : nullptr;
    c.count = shard.units * kUnit;
    c.shape = tag;
    c.work = this;
    return c;
  }
  at::Tensor memory;
  cpu::Shard shard;
};

struct ReduceWork : BucketWork {
  using BucketWork::BucketWork;
  void run(const void* const* in, void* const* out) const override {
    std::vector<double> sums(shard.size());
    on_torch_threads(sums.size(),
                     [&](size_t from, size_t to) { cpu::reduce_units(shard, in, out, sums.data(), from, to); });
    *squares.mutable_data_ptr<double>() = std::accumulate(sums.begin(), sums.end(), 0.0);
  }
  at::Tensor grads, squares;
};

struct UpdateWork : BucketWork {
  using BucketWork::BucketWork;
  void run(const void* const* in, void* const* out) const override {
    on_torch_threads(shard.size(),
                     [&](size_t from, size_t to) { cpu::update_units(shard, in, out, state, segments, from, to); });
  }
  cpu::AdamState state;
  std::vector<cpu::Segment> segments;
};

float* state_of(const std::optional<at::Tensor>& t, const char* name, const cpu::Shard& shard) {
  if (!t) return nullptr;
  check_dense(*t, name, at::kFloat, shard.size() * kUnit);
  return t->mutable_data_ptr<float>();
}

// Of the parameters that the step updates, whose steps it counts.
std::vector<cpu::Segment> segments_of(const at::Tensor& segments, const at::Tensor& steps, const at::Tensor& used,
                                      const std::vector<AdamGroup>& groups, double factor) {
  const auto n = static_cast<size_t>(steps.numel());
  const auto* const row = segments.const_data_ptr<int64_t>();
  std::vector<cpu::Segment> made;
  for (size_t k = 0; k < n; ++k) {
    if (!used.const_data_ptr<bool>()[k]) continue;
    const auto& [lr, beta1, beta2, eps, decay, decoupled, maximize, master, amsgrad, stochastic] =
        groups.at(static_cast<size_t>(row[4 * k + 3]));
    const float step = steps.mutable_data_ptr<float>()[k] += 1;
    const AdamSettings settings{lr, beta1, beta2, eps, decay, decoupled, maximize};
    const auto begin = static_cast<size_t>(row[4 * k]), count = static_cast<size_t>(row[4 * k + 1]);
    made.push_back({begin, begin + count, static_cast<uint64_t>(row[4 * k + 2]),
                    adam_scalars(settings, static_cast<uint32_t>(step), factor, kRoundingSeed), master, amsgrad,
                    stochastic});
  }
  return made;
}

// What all ranks must give alike.
uint64_t hash_of(const at::Tensor& params, const at::Tensor& segments, const at::Tensor& steps, const at::Tensor& used,
                 const std::vector<AdamGroup>& groups, double factor, uint64_t tag) {
  size_t hash = c10::hash_combine(tag, std::hash<double>()(factor));
  hash = c10::hash_combine(hash, static_cast<size_t>(params.scalar_type()));
  for (const AdamGroup& group : groups) {
    std::apply([&](auto... values) { ((hash = c10::hash_combine(hash, c10::hash<decltype(values)>()(values))), ...); },
               group);
  }
  for (int64_t k = 0; k < used.numel(); ++k) {
    hash = c10::hash_combine(hash, used.const_data_ptr<bool>()[k]);
    hash = c10::hash_combine(hash, c10::hash<float>()(steps.const_data_ptr<float>()[k]));
    for (int i = 0; i < 4; ++i) hash = c10::hash_combine(hash, segments.const_data_ptr<int64_t>()[4 * k + i]);
  }
  return hash;
}

void check_gradient(const at::Tensor& grad, const at::Tensor& param, at::Device device) {
  if (grad.layout() != at::kStrided) {
    throw_unsupported("a gradient is sparse: make it dense, for an embedding with sparse=False");
  }
  if (!grad.has_storage() || (grad.numel() > 0 && grad.const_data_ptr() == nullptr)) {
    throw_unsupported("a gradient has no memory of its own (a DTensor?): give local tensors");
  }
  if (!float_dtype(grad) || grad.device() != device || grad.sizes() != param.sizes()) {
    throw_unsupported(c10::str("a gradient of ", grad.scalar_type(), grad.sizes(), " on ", grad.device(),
                               " does not fit its parameter of ", param.sizes(), ": float32, bfloat16 and float16 on ",
                               device, " it can be"));
  }
}

// Its elements in the memory order of the parameter.
at::Tensor in_order(const at::Tensor& grad, const at::Tensor& param) {
  if (grad.strides() == param.strides() && !grad.is_neg()) return grad;
  return at::empty_strided(param.sizes(), param.strides(), grad.options()).copy_(grad);
}

void pack_on_cpu(const std::vector<Packed>& gradients, Wire wire, const at::Tensor& memory,
                 const std::optional<at::Tensor>& residual, bool streams) {
  float* const lost = residual ? residual->mutable_data_ptr<float>() : nullptr;
  void* const to = memory.mutable_data_ptr();
  const BlockList blocks(gradients.size(), [&](size_t k) { return gradients[k].count; });
  on_torch_threads(blocks.count(), [&](size_t from, size_t until) {
    blocks.for_each(from, until, [&](size_t k, size_t begin, size_t end) {
      const Packed& g = gradients[k];
      const DType dtype = g.grad.defined() ? *float_dtype(g.grad) : DType::kFloat32;
      const void* const grad =
          g.grad.defined() ? static_cast<const std::byte*>(g.grad.const_data_ptr()) + begin * size_of(dtype) : nullptr;
      cpu::pack(wire, grad, dtype, g.first + begin, std::min(end, g.count) - begin, to, lost, streams);
    });
  });
}

#ifdef PYCOLL_WITH_CUDA
at::Tensor or_undefined(const std::optional<at::Tensor>& t) { return t ? *t : at::Tensor(); }

void check_vectors(const at::Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) throw_usage("a bucket's memory begins at 16 bytes");
}
#endif

}  // namespace

c10::intrusive_ptr<c10d::Work> reduce_bucket(Caller& caller, const std::string& wire, const at::Tensor& memory,
                                             const std::optional<at::Tensor>& grads, const at::Tensor& squares,
                                             uint64_t tag, bool streams, bool async) {
  const auto work = std::make_shared<ReduceWork>(caller, wire, memory, streams);
  check_dense(squares, "sum of squares", at::kDouble, 1);
  if (grads) {
    check_dense(*grads, "gradients", at::kFloat, work->shard.units * kUnit);
    work->grads = *grads;
  }
  work->squares = squares;
  const cpu::Call call = work->call(grads ? Collective::kReduceBucket : Collective::kMeasureBucket, work->grads, tag);
  caller.comm().check(call);
  return caller.start(
      c10d::OpType::ALLREDUCE, grads ? "pycoll:reduce_bucket" : "pycoll:measure_bucket", {memory},
      [work, call](const cpu::Communicator::Runner& run) { run(call); }, async);
}

void update_bucket(Caller& caller, const std::string& wire, const at::Tensor& memory, uint64_t tag, bool streams,
                   const at::Tensor& params, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
                   const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
                   const at::Tensor& segments, const at::Tensor& steps, const at::Tensor& used,
                   const std::vector<AdamGroup>& groups, double factor) {
  const auto work = std::make_shared<UpdateWork>(caller, wire, memory, streams);
  const auto dtype = float_dtype(params);
  if (!dtype) throw_unsupported(c10::str("parameters of ", params.scalar_type(), " cannot be updated"));
  check_dense(params, "parameters", params.scalar_type(), work->shard.units * kUnit);
  work->state = {*dtype, state_of(master, "master weights", work->shard), state_of(exp_avg, "exp_avg", work->shard),
                 state_of(exp_avg_sq, "exp_avg_sq", work->shard),
                 state_of(max_exp_avg_sq, "max_exp_avg_sq", work->shard)};
  const auto n = static_cast<size_t>(steps.numel());
  check_dense(segments, "segments", at::kLong, 4 * n);
  check_dense(steps, "steps", at::kFloat, n);
  check_dense(used, "used", at::kBool, n);
  const cpu::Call call =
      work->call(Collective::kUpdateBucket, params, hash_of(params, segments, steps, used, groups, factor, tag));
  caller.comm().check(call);
  work->segments = segments_of(segments, steps, used, groups, factor);
  caller.start(
      c10d::OpType::ALLREDUCE, "pycoll:update_bucket", {memory},
      [&call](const cpu::Communicator::Runner& run) { run(call); }, /*async=*/false);
}

uint64_t sample(const std::vector<std::optional<at::Tensor>>& grads) {
  constexpr int64_t kSamples = 16;
  size_t hash = grads.size();
  for (const auto& grad : grads) {
    if (!grad || !grad->is_cpu() || !grad->has_storage() || !grad->is_non_overlapping_and_dense()) continue;
    const auto* const data = static_cast<const std::byte*>(grad->const_data_ptr());
    const auto size = static_cast<size_t>(grad->element_size());
    const int64_t count = grad->numel(), step = std::max<int64_t>(1, count / kSamples);
    for (int64_t i = 0; i < count; i += step) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + static_cast<size_t>(i) * size, std::min(size, sizeof bits));
      hash = c10::hash_combine(hash, bits);
    }
  }
  return hash;
}

void pack(const std::vector<at::Tensor>& params, const std::vector<std::optional<at::Tensor>>& grads,
          const std::vector<uint64_t>& firsts, const std::string& wire_name, const at::Tensor& memory,
          const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& factor,
          const std::optional<at::Tensor>& found_inf, bool streams) {
  const Wire wire = parse_wire(wire_name);
  const size_t units = memory.nbytes() / unit_bytes(wire);
  const at::Device device = memory.device();
  check_dense(memory, "wire", memory.scalar_type(), units * unit_bytes(wire) / memory.element_size(), device);
  if (residual) check_dense(*residual, "residual", at::kFloat, units * kUnit, device);
  if (factor) check_dense(*factor, "factor", at::kFloat, 1, device);
  if (found_inf) check_dense(*found_inf, "found_inf", at::kFloat, 1, device);
  std::vector<Packed> gradients;
  for (size_t k = 0; k < params.size(); ++k) {
    const auto count = static_cast<size_t>(params[k].numel());
    if (firsts.at(k) % kScaleBlock != 0 || firsts[k] + count > units * kUnit) {
      throw_usage(c10::str("a bucket of ", units * kUnit, " elements has no room for ", count, " at ", firsts[k]));
    }
    at::Tensor source;
    if (grads.at(k)) {
      check_gradient(*grads[k], params[k], device);
      source = in_order(*grads[k], params[k]);
    }
    gradients.push_back({source, firsts[k], count});
  }
#ifdef PYCOLL_WITH_CUDA
  if (memory.is_cuda()) {
    for (const at::Tensor* t : {&memory, residual ? &*residual : &memory}) {
      if (wire == Wire::kInt8) check_vectors(*t);
    }
    return pack_on_cuda(gradients, wire, memory, or_undefined(residual), or_undefined(factor), or_undefined(found_inf));
  }
#endif
  if (!device.is_cpu()) throw_unsupported(c10::str("gradients are packed on CPU and CUDA, not on ", device));
  if (factor || found_inf) throw_unsupported("packing on the CPU has no factor and looks for no infinities");
  pack_on_cpu(gradients, wire, memory, residual, streams);
}

void average_int8([[maybe_unused]] const at::Tensor& wires, const at::Tensor& to) {
  if (!to.is_cuda()) throw_unsupported(c10::str("wires are averaged one by one on CUDA alone, not on ", to.device()));
#ifdef PYCOLL_WITH_CUDA
  const auto size = static_cast<size_t>(to.numel());
  const size_t one = std::max<size_t>(size / kUnit * sizeof(Int8Unit), 1), world = wires.nbytes() / one;
  check_dense(to, "average", at::kFloat, size / kUnit * kUnit, to.device());
  check_dense(wires, "wires", at::kByte, world * one, to.device());
  check_vectors(wires);
  check_vectors(to);
  average_on_cuda(wires, static_cast<int>(world), to);
#endif
}

}  // namespace pycoll::bindings
