// A CPU thread as the executor of the algorithm templates (the concept is described in core/channel.h). Failures leave
// by exception.
#pragma once

#include <vector>

#include "core/combine.h"
#include "cpu/kernels.h"
#include "cpu/wait.h"

namespace pycoll::cpu {

class Executor {
 public:
  Executor(Waiter waiter, DType dtype, ReduceOp op, int world)
      : waiter_(waiter),
        kernels_(kernels()),
        combine_(kernels_.combine[static_cast<int>(dtype)][static_cast<int>(op)]),
        pointers_(2 * static_cast<size_t>(world) + 4),
        world_(world) {}

  bool leader() const { return true; }
  bool sync(bool ok) const { return ok; }
  bool await(const Cell& cell, uint64_t value, int peer) {
    waiter_.await(cell, value, peer);
    return true;
  }
  bool await_barrier(const PeerTable& table, int channel, uint64_t epoch) {
    waiter_.await_barrier(table, channel, epoch);
    return true;
  }
  void post(Cell& cell, uint64_t value) const { cpu::post(cell, value); }
  void combine(const CombineArgs& args) const { combine_(args); }
  void copy(void* dst, const void* src, size_t bytes) const { kernels_.copy(dst, src, bytes); }
  const void** sources() { return const_cast<const void**>(pointers_.data()); }
  void** destinations() { return pointers_.data() + world_ + 1; }

 private:
  Waiter waiter_;
  const Kernels& kernels_;
  void (*combine_)(const CombineArgs&);
  std::vector<void*> pointers_;
  const int world_;
};

}  // namespace pycoll::cpu
