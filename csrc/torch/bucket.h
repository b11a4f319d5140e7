// The calls of gradient buckets on torch tensors (csrc/README.md, B4): what csrc/cpu/bucket.h does with a shard, shared
// out among torch's threads; on a GPU packing alone, the rest is made of a communicator's calls. pycoll/_C.pyi and
// pycoll/buckets document them.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/wire.h"
#include "torch/caller.h"

namespace pycoll::bindings {

// lr, beta1, beta2, eps, weight_decay, decoupled, maximize, master, amsgrad, stochastic: of a group of parameters.
using AdamGroup = std::tuple<double, double, double, double, double, bool, bool, bool, bool, bool>;

// All ranks must give a call the same `tag`. `streams`: on the CPU, what is written without having been read goes past the
// caches.

// The average of all ranks' wires into `grads` (fp32, of all ranks; none: only measured), and the sum of the squares of this
// rank's shard of it into `squares` (one fp64).
c10::intrusive_ptr<c10d::Work> reduce_bucket(Caller& caller, const std::string& wire, const at::Tensor& memory,
                                             const std::optional<at::Tensor>& grads, const at::Tensor& squares,
                                             uint64_t tag, bool streams, bool async);

// A step of Adam by that average. `params`: the bucket's parameters. The state: fp32, of the shard. `segments`, int64
// [n, 4], ascending: first element in the bucket, elements, first element among all parameters, group. `steps` [n]: made
// so far; `used` [n]: whether the step updates it.
void update_bucket(Caller& caller, const std::string& wire, const at::Tensor& memory, uint64_t tag, bool streams,
                   const at::Tensor& params, const std::optional<at::Tensor>& master, const at::Tensor& exp_avg,
                   const at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& max_exp_avg_sq,
                   const at::Tensor& segments, const at::Tensor& steps, const at::Tensor& used,
                   const std::vector<AdamGroup>& groups, double factor);

// A number that changes when gradients do, as a whole: of some elements of each. CPU; none where a tensor is undefined.
uint64_t sample(const std::vector<std::optional<at::Tensor>>& grads);

// Gradients into a wire, each in the memory order of its parameter, from element firsts[k] on; none: zeros. On a GPU they
// may be multiplied by `factor` on their way, and `found_inf` told; one float each.
void pack(const std::vector<at::Tensor>& params, const std::vector<std::optional<at::Tensor>>& grads,
          const std::vector<uint64_t>& firsts, const std::string& wire, const at::Tensor& memory,
          const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& factor,
          const std::optional<at::Tensor>& found_inf, bool streams);

// Wires in 8 bits on a GPU, one after another, averaged in fp32.
void average_int8(const at::Tensor& wires, const at::Tensor& to);

// A gradient in its parameter's memory order, for elements `first` to `first + count` of a bucket.
struct Packed {
  at::Tensor grad;  // undefined: zeros
  size_t first, count;
};

#ifdef PYCOLL_WITH_CUDA
void pack_on_cuda(const std::vector<Packed>& gradients, Wire wire, const at::Tensor& memory, const at::Tensor& residual,
                  const at::Tensor& factor, const at::Tensor& found_inf);
void average_on_cuda(const at::Tensor& wires, int world, const at::Tensor& to);
#endif

}  // namespace pycoll::bindings
