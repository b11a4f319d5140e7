// All-to-all as a job: rows of one tensor by splits, or a list of tensors.
#include "torch/errors.h"
#include "torch/job.h"

namespace pycoll::bindings {

namespace {

Job exchange_job(Seat seat, const Blocks& x, const Blocks& out, std::vector<uint64_t> send,
                 std::vector<uint64_t> recv) {
  if (x.memory.scalar_type() != out.memory.scalar_type()) {
    throw_usage("all_to_all: input and output tensors must have one dtype");
  }
  for (const Dense& d : x.parts) check_memory(d.tensor(), "all_to_all");
  for (const Dense& d : out.parts) check_writable(d.tensor(), "all_to_all");
  const auto* in_begin = static_cast<const std::byte*>(x.memory.const_data_ptr());
  auto* out_begin = static_cast<std::byte*>(out.memory.mutable_data_ptr());
  if (seat.world > 1 && in_begin < out_begin + out.memory.nbytes() && out_begin < in_begin + x.memory.nbytes()) {
    throw_usage("all_to_all: input and output overlap: give separate tensors");
  }
  cpu::Call call = movement(Collective::kAllToAll, x.memory);
  const uint64_t bytes_as_elements = call.dtype == DType::kUInt8 ? x.memory.element_size() : 1;
  for (auto* counts : {&send, &recv}) {
    for (uint64_t& n : *counts) n *= bytes_as_elements;
  }
  call.count = 0;
  call.in = in_begin;
  call.out = out_begin;
  Job job{{}, x.parts, out.parts, {}, {}};
  call.send_counts = job.counts.emplace_back(std::move(send)).data();
  call.recv_counts = job.counts.emplace_back(std::move(recv)).data();
  for (const Dense& d : out.parts) job.result.push_back(d.tensor());
  job.calls.push_back(call);
  return job;
}

std::vector<uint64_t> counts_of(Seat seat, const at::Tensor& t, const Splits& splits, const char* which) {
  const int64_t rows = t.dim() == 0 ? 1 : t.size(0), row = rows == 0 ? 0 : t.numel() / rows;
  if (splits.empty()) {
    if (rows % seat.world != 0) {
      throw_usage(c10::str("all_to_all: the ", which, "'s first dimension, ", rows, ", is not a multiple of ",
                           seat.world, " ranks: give splits"));
    }
    return std::vector<uint64_t>(seat.world, static_cast<uint64_t>(rows / seat.world * row));
  }
  std::vector<uint64_t> counts;
  int64_t sum = 0;
  for (const int64_t n : splits) {
    if (n < 0) throw_usage("all_to_all: a split is negative");
    sum += n;
    counts.push_back(static_cast<uint64_t>(n * row));
  }
  if (static_cast<int>(splits.size()) != seat.world || sum != rows) {
    throw_usage(c10::str("all_to_all: the ", which, " needs ", seat.world, " splits that add up to its ", rows,
                         " rows, not ", splits));
  }
  return counts;
}

std::vector<uint64_t> counts_of(const Tensors& list) {
  std::vector<uint64_t> counts;
  for (const at::Tensor& t : list) counts.push_back(static_cast<uint64_t>(t.numel()));
  return counts;
}

}  // namespace

Job all_to_all_job(Seat seat, const at::Tensor& x, const at::Tensor& out, const Splits& send, const Splits& recv) {
  check_memory(x, "all_to_all");
  check_writable(out, "all_to_all");
  return exchange_job(seat, Blocks(x), Blocks(out), counts_of(seat, x, send, "input"),
                      counts_of(seat, out, recv, "output"));
}

Job all_to_all_job(Seat seat, const Tensors& x, const Tensors& out) {
  check_list(seat, x, x.empty() ? at::Tensor() : x[0], "all_to_all");
  check_list(seat, out, x[0], "all_to_all");
  return exchange_job(seat, Blocks(x), Blocks(out), counts_of(x), counts_of(out));
}

}  // namespace pycoll::bindings
