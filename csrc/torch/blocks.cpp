#include "torch/blocks.h"

#include <algorithm>

#include "torch/errors.h"

namespace pycoll::bindings {

namespace {

// Whether the tensors follow one another in memory.
bool lie_in_a_row(const Tensors& list) {
  const at::Tensor& first = list.front();
  int64_t offset = first.storage_offset();
  for (const at::Tensor& t : list) {
    if (!t.is_contiguous() || !t.is_alias_of(first) || t.storage_offset() != offset) return false;
    offset += t.numel();
  }
  return true;
}

}  // namespace

Blocks::Blocks(const at::Tensor& whole) {
  parts.emplace_back(whole);
  memory = parts.front().memory();
}

Blocks::Blocks(const Tensors& list) {
  int64_t total = 0;
  for (const at::Tensor& t : list) total += t.numel();
  const at::Tensor& first = list.front();
  const bool in_place = lie_in_a_row(list);
  memory = in_place ? first.as_strided({total}, {1}) : at::empty({total}, first.options());
  int64_t offset = 0;
  for (const at::Tensor& t : list) {
    parts.emplace_back(t, in_place ? t : memory.narrow(0, offset, t.numel()).view(t.sizes()));
    offset += t.numel();
  }
}

Blocks::Blocks(Seat seat, const Tensors& list, const at::Tensor& like, const char* collective)
    : Blocks((check_list(seat, list, like, collective), list)) {
  if (of_one_size(list, like)) return;
  throw_unsupported(std::string(collective) + " of tensors of different sizes: pad them, or use all_to_all");
}

void check_blocks(Seat seat, const at::Tensor& block, const at::Tensor& whole, const char* collective,
                  const char* which) {
  if (whole.scalar_type() == block.scalar_type() && whole.numel() == block.numel() * seat.world) return;
  throw_usage(c10::str(collective, ": the ", which, " must hold ", seat.world, " blocks of ", block.numel(), " ",
                       block.scalar_type(), " elements, not ", whole.numel(), " of ", whole.scalar_type()));
}

void check_list(Seat seat, const Tensors& list, const at::Tensor& like, const char* collective) {
  if (static_cast<int>(list.size()) != seat.world) {
    throw_usage(c10::str(collective, " needs a list of ", seat.world, " tensors, not of ", list.size()));
  }
  for (const at::Tensor& t : list) {
    check_memory(t, collective);
    if (t.scalar_type() != like.scalar_type() || t.device() != like.device()) {
      throw_usage(std::string(collective) + ": input and output tensors must have one dtype and lie on one device");
    }
  }
}

bool of_one_size(const Tensors& list, const at::Tensor& like) {
  return std::all_of(list.begin(), list.end(), [&](const at::Tensor& t) { return t.numel() == like.numel(); });
}

}  // namespace pycoll::bindings
