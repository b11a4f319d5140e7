// A thread block as the executor of the algorithm templates (the concept is described in core/channel.h).
//
// Only the block's leader looks at flags. No spin is unbounded: every 20 us it looks at an abort word that the host can
// write, and at the deadline; after a failure all later waits and moves of the block are skipped, so that the kernel
// ends and the device stays usable.
#pragma once

#include <cuda/std/chrono>

#include "core/atomic.h"
#include "core/cell.h"
#include "core/combine.h"
#include "core/layout.h"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

// The loops, one function a dtype and operation. Not inlined: the kernel that calls them holds every algorithm once,
// for all of them.
template <class T, ReduceOp Op, class Group>
__device__ __noinline__ void combine_block(const Group& group, const CombineArgs& args) {
  combine_strided<T, Op>(group, args);
}

class BlockExecutor {
 public:
  __device__ BlockExecutor(DType dtype, ReduceOp op, Status* status, uint64_t timeout_ns)
      : dtype_(dtype), op_(op), status_(status), timeout_ns_(timeout_ns) {}

  __device__ size_t thread() const { return threadIdx.x; }
  __device__ size_t size() const { return blockDim.x; }
  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ bool sync(bool ok) {
    failed_ |= !__syncthreads_and(ok && !failed_);
    return !failed_;
  }

  __device__ bool await(const Cell& cell, uint64_t value, int peer) {
    if (failed_) return false;
    const uint64_t begin = now_ns();
    for (uint64_t looked = begin; load_acquire(cell.value) < value;) {
      const uint64_t now = now_ns();
      if (now - looked < 20000) continue;
      looked = now;
      if (load_acquire(status_->outcome) != kRunning) return false;
      if (now - begin > timeout_ns_) {
        if (compare_exchange(status_->outcome, uint32_t{kRunning}, uint32_t{kTimedOut})) status_->rank = peer;
        return false;
      }
    }
    return true;
  }
  __device__ bool await_barrier(const PeerTable& table, int channel, uint64_t epoch) {
    bool ok = true;
    for (int i = 1; ok && i < table.geometry.world; ++i) {
      const int r = (table.rank + i) % table.geometry.world;
      ok = await(table.barrier_cell(r, channel, epoch), epoch, r);
    }
    return ok;
  }
  __device__ void post(Cell& cell, uint64_t value) const {
    if (!failed_) store_release(cell.value, value);
  }

  __device__ void combine(const CombineArgs& args) const {
    dispatch_dtype(dtype_, [&](auto tag) {
      using T = typename decltype(tag)::type;
      switch (op_) {
        case ReduceOp::kSum:
          return combine_block<T, ReduceOp::kSum>(*this, args);
        case ReduceOp::kAvg:
          return combine_block<T, ReduceOp::kAvg>(*this, args);
        case ReduceOp::kMin:
          return combine_block<T, ReduceOp::kMin>(*this, args);
        case ReduceOp::kMax:
          return combine_block<T, ReduceOp::kMax>(*this, args);
        case ReduceOp::kProduct:
          return combine_block<T, ReduceOp::kProduct>(*this, args);
      }
    });
  }
  __device__ void copy(void* dst, const void* src, size_t bytes) const {
    combine_block<uint8_t, ReduceOp::kMax>(*this, {&dst, 1, &src, 1, 0, true, 1, bytes});
  }
  __device__ const void** sources() { return sources_; }
  __device__ void** destinations() { return destinations_; }

 private:
  const DType dtype_;
  const ReduceOp op_;
  __device__ static uint64_t now_ns() {
    using namespace cuda::std::chrono;
    return static_cast<uint64_t>(duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count());
  }

  Status* status_;
  uint64_t timeout_ns_;
  bool failed_ = false;
  const void* sources_[kMaxRanks];
  void* destinations_[kMaxRanks + 1];
};

}  // namespace pycoll::cuda_device
