// A thread block as the executor of the algorithm templates (the concept is described in core/channel.h).
//
// No spin is unbounded: every 20 us a waiting thread looks at the deadline and at a word that says whether some block of
// the rank has failed; leaders look at the host's word too. After a failure all later waits and moves are skipped, so
// that the kernel ends and the device stays usable.
#pragma once

#include <cuda/atomic>
#include <cuda/std/chrono>

#include "core/atomic.h"
#include "core/cell.h"
#include "core/layout.h"
#include "cuda/combine.cuh"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

class BlockExecutor {
 public:
  __device__ BlockExecutor(DType dtype, ReduceOp op, const DeviceRank& rank, uint64_t timeout_ns)
      : dtype_(dtype), op_(op), rank_(rank), timeout_ns_(timeout_ns), failed_(load_relaxed(*rank.stopped) != 0) {}

  __device__ size_t thread() const { return threadIdx.x; }
  __device__ size_t size() const { return blockDim.x; }
  __device__ bool leader() const { return threadIdx.x == 0; }
  __device__ bool sync(bool ok) {
    failed_ |= !__syncthreads_and(ok && !failed_);
    return !failed_;
  }

  template <class Predicate>
  __device__ bool await_until(const Predicate& holds, int peer) const {
    return !failed_ && spin(holds, peer);
  }
  __device__ bool await(const Cell& cell, uint64_t value, int peer) const {
    return await_until([&] { return load_acquire(cell.value) >= value; }, peer);
  }
  // Not inlined, as what else is long and called from many places: each copy would hold registers.
  __device__ __noinline__ bool await_barrier(const PeerTable& table, int channel, uint64_t epoch) const {
    return !failed_ && spin_at_barrier(table, channel, epoch);
  }
  __device__ void post(Cell& cell, uint64_t value) const {
    if (!failed_) store_release(cell.value, value);
  }
  __device__ void fence() const { cuda::atomic_thread_fence(cuda::memory_order_seq_cst, cuda::thread_scope_system); }

  __device__ __noinline__ void report_mismatch(const PeerTable& table, int channel, uint64_t epoch) const {
    if (!spin_at_barrier(table, channel, epoch) || !is_first_to_fail()) return;
    for (int r = 0; r < table.geometry.world; ++r) {
      rank_.report->records[r] = table.barrier_cell(r, channel, epoch).record;
    }
    store_release(rank_.report->outcome, uint32_t{kMismatched});
  }

  __device__ __noinline__ void report_counts(int from, int to, uint64_t sent, uint64_t expected) {
    failed_ = true;  // the group is told where it next meets
    if (!is_first_to_fail()) return;
    rank_.report->rank = from;
    rank_.report->to = to;
    rank_.report->sent = sent;
    rank_.report->expected = expected;
    store_release(rank_.report->outcome, uint32_t{kCountsDiffer});
  }

  __device__ void combine(const CombineArgs& args) const {
    if (!failed_) cuda_device::combine({thread(), size()}, dtype_, op_, args);
  }
  __device__ void copy(void* dst, const void* src, size_t bytes) const {
    if (!failed_) cuda_device::copy({thread(), size()}, dst, src, bytes);
  }
  __device__ uint64_t reduce(const uint64_t* units, int count) const { return reduce_units(dtype_, op_, units, count); }
  __device__ void reduce_in_switch(const PeerTable& table, size_t offset, size_t count) const {
    if (!failed_) cuda_device::reduce_in_switch({thread(), size()}, dtype_, table.multicast + offset, count);
  }
  __device__ const void** sources() { return sources_; }
  __device__ void** destinations() { return destinations_; }
  __device__ uint64_t* units() { return units_; }

 private:
  static constexpr uint64_t kLookEveryNs = 20000;

  __device__ static uint64_t now_ns() {
    using namespace cuda::std::chrono;
    return static_cast<uint64_t>(duration_cast<nanoseconds>(system_clock::now().time_since_epoch()).count());
  }

  template <class Predicate>
  __device__ __noinline__ bool spin(const Predicate& holds, int peer) const {
    if (holds()) return true;
    const uint64_t begin = now_ns();
    unsigned looks = 0;
    for (uint64_t looked = begin; !holds();) {
      const uint64_t now = now_ns();
      if (now - looked < kLookEveryNs) continue;
      looked = now;
      const bool looks_far = leader() || ++looks % 50 == 0;
      if (told_to_stop(looks_far)) return false;
      // What a rank did before it left still counts.
      if (looks_far && (load_acquire(rank_.report->left) >> peer & 1) != 0 && !holds()) return fail(kLeft, peer);
      if (now - begin > timeout_ns_) return fail(kTimedOut, peer);
    }
    return true;
  }
  __device__ bool fail(Outcome outcome, int peer) const {
    if (is_first_to_fail()) {
      rank_.report->rank = peer;
      store_release(rank_.report->outcome, uint32_t{outcome});
    }
    return false;
  }
  __device__ bool spin_at_barrier(const PeerTable& table, int channel, uint64_t epoch) const {
    bool ok = true;
    for (int i = 1; ok && i < table.geometry.world; ++i) {
      const int r = (table.rank + i) % table.geometry.world;
      const Cell& cell = table.barrier_cell(r, channel, epoch);
      ok = spin([&] { return load_acquire(cell.value) >= epoch; }, r);
    }
    return ok;
  }

  // The host's words lie behind a slow bus: leaders look at them, and tell the rank's other threads; these do so rarely,
  // for the case that their leader waits elsewhere.
  __device__ bool told_to_stop(bool looks_far) const {
    if (looks_far && load_acquire(rank_.report->outcome) != kRunning) store_release(*rank_.stopped, uint32_t{1});
    return load_acquire(*rank_.stopped) != 0;
  }
  __device__ bool is_first_to_fail() const { return exchange_seq_cst(*rank_.stopped, uint32_t{1}) == 0; }

  const DType dtype_;
  const ReduceOp op_;
  const DeviceRank& rank_;
  const uint64_t timeout_ns_;
  bool failed_;
  const void* sources_[kMaxRanks];
  void* destinations_[kMaxRanks + 1];
  uint64_t units_[kMaxRanks];
};

}  // namespace pycoll::cuda_device
