// What a rank gives to, or gets from, each rank: a block of one tensor, or a tensor of a list.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <vector>

#include "torch/tensors.h"

namespace pycoll::bindings {

using Tensors = std::vector<at::Tensor>;

// Who makes the calls.
struct Seat {
  int rank, world;
};

// A tensor of blocks, one for each rank, in dense memory: one tensor, or a list, whose tensors are copied from or to
// their places, unless they lie there already.
struct Blocks {
  explicit Blocks(const at::Tensor& whole);
  explicit Blocks(const Tensors& list);
  // A list of `world` tensors of the size of `like`. Throws UsageError, UnsupportedError.
  Blocks(Seat seat, const Tensors& list, const at::Tensor& like, const char* collective);
  at::Tensor memory;
  c10::SmallVector<Dense, 2> parts;
};

// All throw UsageError or UnsupportedError. `whole` holds a block for each rank, and is the `which` of the collective.
void check_blocks(Seat seat, const at::Tensor& block, const at::Tensor& whole, const char* collective,
                  const char* which);
// A tensor for each rank, of the dtype and on the device of `like`.
void check_list(Seat seat, const Tensors& list, const at::Tensor& like, const char* collective);
bool of_one_size(const Tensors& list, const at::Tensor& like);

}  // namespace pycoll::bindings
