// The machine's ceilings for `pycoll bench`: the reads and writes of a two-shot all-reduce (sum), and of a copy from
// rank to rank, with no synchronization at all; those of a step of AdamW, and of packing gradients. The results mean
// nothing; the accesses are those of csrc/algorithms/two_shot.h, csrc/cpu/adam_body.h and csrc/cpu/bucket.cpp.
#include <torch/extension.h>

#include "core/partition.h"
#include "cpu/kernels.h"
#include "cpu/kernels_isa.h"
#include "torch/block_list.h"
#include "torch/modules.h"
#include "torch/tensors.h"

namespace pycoll::bindings {

namespace {

class Accesses {
 public:
  Accesses(const at::Tensor& like, int world)
      : element_(like.element_size()),
        world_(world),
        combine_(cpu::kernels().combine[static_cast<int>(elements_to_reduce(like, "the ceiling").dtype)]
                                       [static_cast<int>(ReduceOp::kSum)]) {}

  std::byte* at(const at::Tensor& t, size_t element) const {
    return static_cast<std::byte*>(t.data_ptr()) + element * element_;
  }
  void combine(const std::vector<void*>& dst, const std::vector<const void*>& src, size_t count) const {
    combine_(
        {dst.data(), static_cast<int>(dst.size()), src.data(), static_cast<int>(src.size()), 0, true, world_, count});
  }
  void copy(void* dst, const void* src, size_t count) const { cpu::kernels().copy(dst, src, count * element_); }

 private:
  const size_t element_;
  const int world_;
  void (*combine_)(const CombineArgs&);
};

// Rank `rank` reads its share of all tensors and writes it to all.
void symmetric(const std::vector<at::Tensor>& tensors, int rank) {
  const int world = static_cast<int>(tensors.size());
  const Accesses memory(tensors[0], world);
  const size_t count = tensors[0].numel(), chunk = round_up(ceil_div(count, world), kGrain);
  const Span mine = Partition{{0, count}, chunk, world}.at(0, rank);
  std::vector<void*> dst;
  std::vector<const void*> src;
  for (int r = 0; r < world; ++r) {
    dst.push_back(memory.at(tensors[(rank + r) % world], mine.offset));
    src.push_back(memory.at(tensors[r], mine.offset));
  }
  memory.combine(dst, src, mine.length);
}

// The same for private tensors: through slots that all map, one place a rank in each.
void staged(const at::Tensor& x, const std::vector<at::Tensor>& slots, int rank) {
  const int world = static_cast<int>(slots.size());
  const Accesses memory(x, world);
  const size_t place = slots[0].numel() / world;
  const Partition partition{{0, static_cast<size_t>(x.numel())}, place, world};
  for (size_t round = 0; round < partition.rounds(); ++round) {
    std::vector<const void*> src;
    for (int r = 0; r < world; ++r) {
      const Span s = partition.at(round, r);
      if (r != rank) memory.copy(memory.at(slots[rank], r * place), memory.at(x, s.offset), s.length);
      src.push_back(r == rank ? memory.at(x, s.offset) : memory.at(slots[r], rank * place));
    }
    const Span mine = partition.at(round, rank);
    memory.combine({memory.at(x, mine.offset), memory.at(slots[rank], rank * place)}, src, mine.length);
    for (int r = 0; r < world; ++r) {
      const Span s = partition.at(round, r);
      if (r != rank) memory.copy(memory.at(x, s.offset), memory.at(slots[r], r * place), s.length);
    }
  }
}

// A large copy from one rank to another through a small buffer, as if both always found it ready.
void pipelined(const at::Tensor& x, const at::Tensor& pipe, bool sends) {
  auto* data = static_cast<std::byte*>(x.data_ptr());
  auto* buffer = static_cast<std::byte*>(pipe.data_ptr());
  const size_t chunk = pipe.nbytes() / 4;
  for (size_t at = 0, turn = 0; at < x.nbytes(); at += chunk, ++turn) {
    std::byte* through = buffer + turn % 4 * chunk;
    const size_t bytes = smaller(chunk, x.nbytes() - at);
    if (sends) {
      cpu::kernels().copy(through, data + at, bytes);
    } else {
      cpu::kernels().copy(data + at, through, bytes);
    }
  }
}

// Past the caches; on the threads that packing would take.
void packing(const std::vector<at::Tensor>& to, const std::vector<at::Tensor>& from) {
  const BlockList blocks(from.size(), [&](size_t k) { return from[k].numel(); });
  on_torch_threads(blocks.count(), [&](size_t first, size_t last) {
    blocks.for_each(first, last, [&](size_t k, size_t begin, size_t end) {
      const size_t size = from[k].element_size(), count = smaller(end, from[k].numel()) - begin;
      cpu::kernels().stream(static_cast<std::byte*>(to[k].mutable_data_ptr()) + begin * size,
                            static_cast<const std::byte*>(from[k].const_data_ptr()) + begin * size, count * size);
    });
    cpu::kernels().drain();
  });
}

// Four words of an element are read and three written.
void touch(uint32_t* a, uint32_t* b, uint32_t* c, const uint32_t* d, size_t count) {
  PYCOLL_INDEPENDENT
  for (size_t i = 0; i < count; ++i) {
    const uint32_t x = a[i], y = b[i], z = c[i] ^ d[i];
    a[i] = y;
    b[i] = z;
    c[i] = x;
  }
}

// fp32 throughout; on the threads that a step would take.
void adam(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
          const std::vector<at::Tensor>& exp_avgs, const std::vector<at::Tensor>& exp_avg_sqs) {
  const BlockList blocks(params.size(), [&](size_t k) { return params[k].numel(); });
  on_torch_threads(blocks.count(), [&](size_t from, size_t to) {
    blocks.for_each(from, to, [&](size_t k, size_t begin, size_t end) {
      const auto words = [&](const at::Tensor& t) { return static_cast<uint32_t*>(t.mutable_data_ptr()) + begin; };
      touch(words(params[k]), words(exp_avgs[k]), words(exp_avg_sqs[k]), words(grads[k]),
            smaller(end, params[k].numel()) - begin);
    });
  });
}

}  // namespace

void bind_ceiling(py::module_& m) {
  m.def("ceiling_symmetric", &symmetric, py::arg("tensors"), py::arg("rank"), py::call_guard<py::gil_scoped_release>());
  m.def("ceiling_staged", &staged, py::arg("x"), py::arg("slots"), py::arg("rank"),
        py::call_guard<py::gil_scoped_release>());
  m.def("ceiling_adam", &adam, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
        py::call_guard<py::gil_scoped_release>());
  m.def("ceiling_packing", &packing, py::arg("to"), py::arg("gradients"), py::call_guard<py::gil_scoped_release>());
  m.def("ceiling_pipelined", &pipelined, py::arg("x"), py::arg("pipe"), py::arg("sends"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace pycoll::bindings
