// A CPU thread as the executor of the algorithm templates (the concept is described in core/channel.h). Failures leave
// by exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/combine.h"
#include "cpu/elsewhere.h"
#include "cpu/error.h"
#include "cpu/kernels.h"
#include "cpu/mismatch.h"
#include "cpu/shard_work.h"
#include "cpu/wait.h"

namespace pycoll::cpu {

class Executor {
 public:
  // `mover`: who moves the data instead of this CPU, or null. `streamed`: memory, maybe none, that is not read soon.
  Executor(Waiter waiter, DType dtype, ReduceOp op, int world, Mover* mover, std::span<const std::byte> streamed)
      : waiter_(waiter),
        mover_(mover),
        streamed_(streamed),
        dtype_(dtype),
        op_(op),
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
  void post(Cell& cell, uint64_t value) {
    if (mover_) waiter_.await_moves(*mover_);  // a post announces them
    cpu::post(cell, value);
  }
  void combine(const CombineArgs& args) const {
    if (mover_) return mover_->combine(dtype_, op_, args);
    combine_(args);
  }
  void copy(void* dst, const void* src, size_t bytes) const {
    if (mover_) return mover_->copy(dst, src, bytes);
    const auto at = reinterpret_cast<uintptr_t>(dst) - reinterpret_cast<uintptr_t>(streamed_.data());
    if (at >= streamed_.size()) return kernels_.copy(dst, src, bytes);
    kernels_.stream(dst, src, bytes);
    kernels_.drain();
  }
  void work(const void* const* in, void* const* out) const { work_->run(in, out); }
  void set_work(const ShardWork* work) { work_ = work; }
  void report_counts(int from, int to, uint64_t sent, uint64_t expected) const {
    throw Error(ErrorKind::kMismatch, counts_text(from, to, sent, expected, waiter_.names()), from);
  }
  const void** sources() { return const_cast<const void**>(pointers_.data()); }
  void** destinations() { return pointers_.data() + world_ + 1; }
  uint64_t* units() {
    units_.resize(world_);
    return units_.data();
  }

 private:
  Waiter waiter_;
  Mover* const mover_;
  const std::span<const std::byte> streamed_;
  const DType dtype_;
  const ReduceOp op_;
  const Kernels& kernels_;
  void (*combine_)(const CombineArgs&);
  std::vector<void*> pointers_;
  std::vector<uint64_t> units_;  // none until asked for
  const int world_;
  const ShardWork* work_ = nullptr;
};

}  // namespace pycoll::cpu
