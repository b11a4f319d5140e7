// Host threads as a thread block, with the bounded waits of csrc/cuda/executor.cuh and every dtype and operation.
#pragma once

#include <atomic>
#include <barrier>
#include <chrono>
#include <thread>

#include "core/atomic.h"
#include "core/combine.h"
#include "core/copy_strided.h"
#include "core/layout.h"
#include "cuda/launch.h"

namespace pycoll::cuda_device {

struct OneThread {
  size_t thread() const { return 0; }
  size_t size() const { return 1; }
};

template <class F>
auto dispatch_any(DType dtype, ReduceOp op, const F& f) {
  return dispatch_dtype(dtype, [&](auto tag) {
    return dispatch_op<typename decltype(tag)::type>(op, [&](auto o) { return f(tag, o); });
  });
}

template <class Threads>
void combine_any(const Threads& threads, DType dtype, ReduceOp op, const CombineArgs& args) {
  dispatch_any(dtype, op, [&](auto tag, auto o) {
    combine_strided<typename decltype(tag)::type, decltype(o)::value>(threads, args);
  });
}

struct HostBlock {
  explicit HostBlock(int threads) : size(threads), meet(threads) {}
  const int size;
  std::barrier<> meet;
  std::atomic<bool> ok[2] = {true, true};  // votes of this sync and of the next
};

class HostBlockExecutor {
 public:
  HostBlockExecutor(HostBlock& block, int thread, DType dtype, ReduceOp op, const DeviceRank& rank, uint64_t timeout_ns)
      : block_(block),
        thread_(thread),
        dtype_(dtype),
        op_(op),
        rank_(rank),
        timeout_(timeout_ns),
        failed_(load_relaxed(*rank.stopped) != 0) {}

  size_t thread() const { return thread_; }
  size_t size() const { return block_.size; }
  bool leader() const { return thread_ == 0; }
  bool sync(bool ok) {
    std::atomic<bool>& vote = block_.ok[syncs_ & 1];
    if (!ok || failed_) vote = false;
    block_.meet.arrive_and_wait();
    failed_ |= !vote;
    if (leader()) block_.ok[~syncs_ & 1] = true;
    ++syncs_;
    block_.meet.arrive_and_wait();
    return !failed_;
  }

  template <class Predicate>
  bool await_until(const Predicate& holds, int peer) const {
    return !failed_ && spin(holds, peer);
  }
  bool await(const Cell& cell, uint64_t value, int peer) const {
    return await_until([&] { return load_acquire(cell.value) >= value; }, peer);
  }
  bool await_barrier(const PeerTable& table, int channel, uint64_t epoch) const {
    return !failed_ && spin_at_barrier(table, channel, epoch);
  }
  void post(Cell& cell, uint64_t value) const {
    if (!failed_) store_release(cell.value, value);
  }
  void fence() const { std::atomic_thread_fence(std::memory_order_seq_cst); }
  void report_mismatch(const PeerTable& table, int channel, uint64_t epoch) const {
    if (!spin_at_barrier(table, channel, epoch) || !is_first_to_fail()) return;
    for (int r = 0; r < table.geometry.world; ++r) {
      rank_.report->records[r] = table.barrier_cell(r, channel, epoch).record;
    }
    store_release(rank_.report->outcome, uint32_t{kMismatched});
  }

  void report_counts(int from, int to, uint64_t sent, uint64_t expected) {
    failed_ = true;  // the group is told where it next meets
    if (!is_first_to_fail()) return;
    rank_.report->rank = from;
    rank_.report->to = to;
    rank_.report->sent = sent;
    rank_.report->expected = expected;
    store_release(rank_.report->outcome, uint32_t{kCountsDiffer});
  }

  void combine(const CombineArgs& args) const {
    if (!failed_) combine_any(*this, dtype_, op_, args);
  }
  void copy(void* dst, const void* src, size_t bytes) const {
    if (!failed_) copy_strided(*this, dst, src, bytes);
  }
  uint64_t reduce(const uint64_t* units, int count) const {
    return dispatch_any(dtype_, op_, [&](auto tag, auto o) {
      return reduce_unit<typename decltype(tag)::type, decltype(o)::value>(units, count);
    });
  }
  void reduce_in_switch(const PeerTable&, size_t, size_t) const {}  // there is no switch, and so no multicast
  const void** sources() { return sources_; }
  void** destinations() { return destinations_; }
  uint64_t* units() { return units_; }

 private:
  template <class Predicate>
  bool spin(const Predicate& holds, int peer) const {
    const auto begin = std::chrono::steady_clock::now();
    while (!holds()) {
      if (leader() && load_acquire(rank_.report->outcome) != kRunning) store_release(*rank_.stopped, uint32_t{1});
      if (load_acquire(*rank_.stopped) != 0) return false;
      if ((load_acquire(rank_.report->left) >> peer & 1) != 0 && !holds()) return fail(kLeft, peer);
      if (std::chrono::steady_clock::now() - begin > timeout_) return fail(kTimedOut, peer);
      std::this_thread::yield();
    }
    return true;
  }
  bool spin_at_barrier(const PeerTable& table, int channel, uint64_t epoch) const {
    bool ok = true;
    for (int i = 1; ok && i < table.geometry.world; ++i) {
      const int r = (table.rank + i) % table.geometry.world;
      ok = spin([&] { return load_acquire(table.barrier_cell(r, channel, epoch).value) >= epoch; }, r);
    }
    return ok;
  }
  bool fail(Outcome outcome, int peer) const {
    if (is_first_to_fail()) {
      rank_.report->rank = peer;
      store_release(rank_.report->outcome, uint32_t{outcome});
    }
    return false;
  }
  bool is_first_to_fail() const { return exchange_seq_cst(*rank_.stopped, uint32_t{1}) == 0; }

  HostBlock& block_;
  const int thread_;
  const DType dtype_;
  const ReduceOp op_;
  const DeviceRank& rank_;
  const std::chrono::nanoseconds timeout_;
  bool failed_;
  unsigned syncs_ = 0;
  const void* sources_[kMaxRanks];
  void* destinations_[kMaxRanks + 1];
  uint64_t units_[kMaxRanks];
};

}  // namespace pycoll::cuda_device
