#include "torch/job.h"

#include <iterator>

#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

void check_root(Seat seat, int root, const char* collective) {
  if (root >= 0 && root < seat.world) return;
  throw_usage(c10::str(collective, ": root ", root, " is not in a group of ", seat.world));
}

void check_like(const at::Tensor& x, const at::Tensor& out, const char* collective) {
  if (out.scalar_type() == x.scalar_type() && out.sizes() == x.sizes()) return;
  throw_usage(c10::str(collective, ": the output must be ", x.scalar_type(), " of shape ", x.sizes(), ", not ",
                       out.scalar_type(), " of shape ", out.sizes()));
}

// What a reduction reads: the tensor, or a copy where it is strided or to be multiplied first.
Dense read(const at::Tensor& x, const Reduction& by) {
  if (!by.factor.defined()) return Dense(x);
  return Dense(x, at::empty(x.sizes(), x.options()), by.factor);
}

// The call of a collective that reduces, as yet without memory; `counted`: what its count is of.
cpu::Call reduction(Collective collective, const at::Tensor& counted, const Reduction& by) {
  const char* what = name(collective);
  if (by.factor.defined() && !at::isFloatingType(counted.scalar_type())) {
    throw_unsupported(std::string(what) + " multiplies only floats before it adds");
  }
  const Elements e = elements_to_reduce(counted, what);
  return {.collective = collective,
          .dtype = e.dtype,
          .op = op_for(counted, by.op, what),
          .count = e.count,
          .shape = fingerprint(counted.scalar_type())};
}

const void* address(const Dense& d) { return d.memory().const_data_ptr(); }
void* writable(const Dense& d) { return d.memory().mutable_data_ptr(); }

}  // namespace

void Job::append(Job&& other) {
  std::move(other.calls.begin(), other.calls.end(), std::back_inserter(calls));
  std::move(other.reads.begin(), other.reads.end(), std::back_inserter(reads));
  std::move(other.writes.begin(), other.writes.end(), std::back_inserter(writes));
  std::move(other.result.begin(), other.result.end(), std::back_inserter(result));
  std::move(other.counts.begin(), other.counts.end(), std::back_inserter(counts));
}

cpu::Call movement(Collective collective, const at::Tensor& counted, int root) {
  const Elements e = elements_to_copy(counted);
  return {.collective = collective,
          .dtype = e.dtype,
          .root = root,
          .count = e.count,
          .shape = fingerprint(counted.scalar_type())};
}

namespace {

// A reduction of whole tensors, to one like them.
Job reduce_whole(cpu::Call call, const at::Tensor& x, const at::Tensor& out, const Reduction& by) {
  const char* what = name(call.collective);
  check_writable(out, what);
  check_like(x, out, what);
  Job job;
  const Dense& result = job.writes.emplace_back(out);
  job.reads.push_back(x.is_same(out) && !by.factor.defined() ? result : read(x, by));
  const Dense& given = job.reads.back();
  check_overlap(given.memory(), result.memory(), 0, what);
  call.in = address(given);
  call.out = writable(result);
  job.calls.push_back(call);
  job.result.push_back(out);
  return job;
}

}  // namespace

Job all_reduce_job(const at::Tensor& x, const at::Tensor& out, const Reduction& by,
                   std::optional<Algorithm> algorithm) {
  check_memory(x, "all_reduce");
  cpu::Call call = reduction(Collective::kAllReduce, x, by);
  call.algorithm = algorithm;
  return reduce_whole(call, x, out, by);
}

Job reduce_job(Seat seat, const at::Tensor& x, const at::Tensor& out, const Reduction& by, int root) {
  check_root(seat, root, "reduce");
  check_memory(x, "reduce");
  cpu::Call call = reduction(Collective::kReduce, x, by);
  call.root = root;
  if (seat.rank == root) return reduce_whole(call, x, out, by);
  const Dense given = read(x, by);
  call.in = address(given);
  return {{call}, {given}, {}, {x}, {}};
}

Job broadcast_job(Seat seat, const at::Tensor& x, int root) {
  check_root(seat, root, "broadcast");
  check_writable(x, "broadcast");  // on the root too: what is wrong is so on all ranks
  const Dense dense(x);
  cpu::Call call = movement(Collective::kBroadcast, x, root);
  call.in = address(dense);
  call.out = const_cast<void*>(call.in);  // which the root does not write
  Job job{{call}, {}, {}, {x}, {}};
  (seat.rank == root ? job.reads : job.writes).push_back(dense);
  return job;
}

Job all_gather_job(Seat seat, const at::Tensor& x, const Blocks& out) {
  check_memory(x, "all_gather");
  for (const Dense& d : out.parts) check_writable(d.tensor(), "all_gather");
  check_blocks(seat, x, out.memory, "all_gather", "output");
  const Dense given(x);
  check_overlap(given.memory(), out.memory, seat.rank, "all_gather");
  cpu::Call call = movement(Collective::kAllGather, x);
  call.in = address(given);
  call.out = out.memory.mutable_data_ptr();
  Job job{{call}, {given}, out.parts, {}, {}};
  for (const Dense& d : out.parts) job.result.push_back(d.tensor());
  return job;
}

Job all_gather_job(Seat seat, const at::Tensor& x, const Tensors& out) {
  check_memory(x, "all_gather");
  check_list(seat, out, x, "all_gather");
  if (of_one_size(out, x)) return all_gather_job(seat, x, Blocks(out));
  if (out[seat.rank].numel() != x.numel()) {
    throw_usage(c10::str("all_gather: this rank's part of the output has ", out[seat.rank].numel(),
                         " elements, its input ", x.numel()));
  }
  Job all;  // each rank broadcasts its own
  for (int r = 0; r < seat.world; ++r) {
    Job job = broadcast_job(seat, out[r], r);
    if (r == seat.rank) {  // out of its part of the output
      check_writable(out[r], "all_gather");
      const Dense mine = job.reads[0];
      job.reads[0] = Dense(x, mine.memory().view(x.sizes()));
      job.writes.push_back(mine);
    }
    all.append(std::move(job));
  }
  return all;
}

Job gather_job(Seat seat, const at::Tensor& x, const std::optional<Blocks>& out, int root) {
  check_root(seat, root, "gather");
  if (seat.rank != root && out) throw_usage("gather: only the root has an output");
  if (seat.rank == root && !out) throw_usage("gather: the root needs an output");
  Job job;
  if (out) {
    job = all_gather_job(seat, x, *out);
  } else {
    check_memory(x, "gather");
    const Dense given(x);
    job = {{movement(Collective::kGather, x)}, {given}, {}, {}, {}};
    job.calls[0].in = address(given);
  }
  job.calls[0].collective = Collective::kGather;
  job.calls[0].root = root;
  return job;
}

Job reduce_scatter_job(Seat seat, const Blocks& x, const at::Tensor& out, const Reduction& by) {
  for (const Dense& d : x.parts) check_memory(d.tensor(), "reduce_scatter");
  check_writable(out, "reduce_scatter");
  check_blocks(seat, out, x.memory, "reduce_scatter", "input");
  cpu::Call call = reduction(Collective::kReduceScatter, x.memory, by);
  const Dense result(out);
  Job job{{}, x.parts, {result}, {out}, {}};
  call.in = x.memory.const_data_ptr();
  if (by.factor.defined()) {
    const Dense multiplied(x.memory, at::empty(x.memory.sizes(), x.memory.options()), by.factor);
    job.reads.push_back(multiplied);  // after its parts are in place
    call.in = address(multiplied);
  } else {
    check_overlap(x.memory, result.memory(), seat.rank, "reduce_scatter");
  }
  call.out = writable(result);
  job.calls.push_back(call);
  return job;
}

Job reduce_scatter_job(Seat seat, const Tensors& x, const at::Tensor& out, const Reduction& by) {
  check_writable(out, "reduce_scatter");
  check_list(seat, x, out, "reduce_scatter");
  if (of_one_size(x, out)) return reduce_scatter_job(seat, Blocks(x), out, by);
  if (x[seat.rank].numel() != out.numel()) {
    throw_usage(c10::str("reduce_scatter: this rank's part of the input has ", x[seat.rank].numel(),
                         " elements, its output ", out.numel()));
  }
  Job all;  // each rank is the root of its own
  for (int r = 0; r < seat.world; ++r) {
    const bool mine = r == seat.rank && out.is_contiguous();
    all.append(reduce_job(seat, x[r], mine ? out.view(x[r].sizes()) : out, by, r));
  }
  all.result = {out};
  return all;
}

Job scatter_job(Seat seat, const std::optional<Blocks>& x, const at::Tensor& out, int root) {
  check_root(seat, root, "scatter");
  if (seat.rank != root && x) throw_usage("scatter: only the root has an input");
  if (seat.rank == root && !x) throw_usage("scatter: the root needs an input");
  check_writable(out, "scatter");
  const Dense result(out);
  cpu::Call call = movement(Collective::kScatter, out, root);
  call.count *= seat.world;
  call.out = writable(result);
  Job job{{}, {}, {result}, {out}, {}};
  if (x) {
    for (const Dense& d : x->parts) check_memory(d.tensor(), "scatter");
    check_blocks(seat, out, x->memory, "scatter", "input");
    check_overlap(x->memory, result.memory(), seat.rank, "scatter");
    call.in = x->memory.const_data_ptr();
    job.reads = x->parts;
  }
  job.calls.push_back(call);
  return job;
}

Job barrier_job() { return {{{.collective = Collective::kBarrier}}, {}, {}, {}, {}}; }

}  // namespace pycoll::bindings
