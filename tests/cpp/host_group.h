// Several host threads that stand in for a thread block: the executor that runs a device's block logic (leader waits,
// strided loops, vector tails) under ThreadSanitizer. It proves index and flag logic, not warps, PTX or memory scopes.
#pragma once

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

#include "core/atomic.h"
#include "core/cell.h"
#include "core/combine.h"
#include "core/copy_strided.h"
#include "core/layout.h"

class HostThreadGroup {
 public:
  explicit HostThreadGroup(int threads) : size(threads), meet(threads) {}
  const int size;
  std::barrier<> meet;
  std::atomic<bool> ok[2] = {true, true};  // votes of this sync and of the next
  std::atomic<int> mismatches = 0;
};

// One thread of the group, for elements of type T combined by Op.
template <class T, pycoll::ReduceOp Op>
class HostThreadExecutor {
 public:
  HostThreadExecutor(HostThreadGroup& group, int thread, int world)
      : group_(group), thread_(thread), sources_(world + 2), destinations_(world + 2), units_(world) {}

  size_t thread() const { return thread_; }
  size_t size() const { return group_.size; }
  bool leader() const { return thread_ == 0; }

  bool sync(bool ok) {
    std::atomic<bool>& vote = group_.ok[syncs_ & 1];
    if (!ok) vote = false;
    group_.meet.arrive_and_wait();
    const bool all = vote;
    if (leader()) group_.ok[~syncs_ & 1] = true;
    ++syncs_;
    group_.meet.arrive_and_wait();
    return all;
  }

  bool await(const pycoll::Cell& cell, uint64_t value, int) {
    while (pycoll::load_acquire(cell.value) < value) std::this_thread::yield();
    return true;
  }
  bool await_barrier(const pycoll::PeerTable& table, int channel, uint64_t epoch) {
    bool ok = true;
    for (int i = 1; ok && i < table.geometry.world; ++i) {
      const int r = (table.rank + i) % table.geometry.world;
      ok = await(table.barrier_cell(r, channel, epoch), epoch, r);
    }
    return ok;
  }
  void post(pycoll::Cell& cell, uint64_t value) { pycoll::store_release(cell.value, value); }
  void combine(const pycoll::CombineArgs& args) const { pycoll::combine_strided<T, Op>(*this, args); }
  void copy(void* dst, const void* src, size_t bytes) const { pycoll::copy_strided(*this, dst, src, bytes); }
  template <class Predicate>
  bool await_until(const Predicate& predicate, int) const {
    while (!predicate()) std::this_thread::yield();
    return true;
  }
  uint64_t reduce(const uint64_t* units, int count) const { return pycoll::reduce_unit<T, Op>(units, count); }
  uint64_t* units() { return units_.data(); }
  void fence() const {  // one that ThreadSanitizer knows
    static std::atomic<int> all{0};
    all.fetch_add(1);
  }
  // What the switch does, by hand.
  void reduce_in_switch(const pycoll::PeerTable& table, size_t offset, size_t count) {
    const int world = table.geometry.world;
    for (int r = 0; r < world; ++r) sources_[r] = destinations_[r] = table.base[r] + offset;
    combine({destinations_.data(), world, sources_.data(), world, 0, true, world, count});
  }
  void report_mismatch(const pycoll::PeerTable& table, int channel, uint64_t epoch) {
    await_barrier(table, channel, epoch);
    ++group_.mismatches;
  }
  void report_counts(int, int, uint64_t, uint64_t) { ++group_.mismatches; }
  const void** sources() { return sources_.data(); }
  void** destinations() { return destinations_.data(); }

 private:
  HostThreadGroup& group_;
  const int thread_;
  unsigned syncs_ = 0;
  std::vector<const void*> sources_;
  std::vector<void*> destinations_;
  std::vector<uint64_t> units_;
};
