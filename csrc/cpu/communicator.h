// A communicator of CPU ranks: collectives on raw memory, in issue order, bounded in time. csrc/torch wraps it.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "core/record.h"
#include "cpu/attach.h"

namespace pycoll::cpu {

// One collective as this rank calls it. Memory is dense; `count` is in elements of the input (all-gather: one rank's
// block; reduce-scatter: all blocks, a multiple of the world size; all-reduce and broadcast: the tensor). In place
// where in == out; they must not overlap otherwise (all-gather, reduce-scatter: `in` or `out` may also be this rank's
// block of the other).
struct Call {
  Collective collective;
  DType dtype = DType::kUInt8;
  ReduceOp op = ReduceOp::kSum;
  std::optional<Algorithm> algorithm{};  // all-reduce only; none: chosen by size ("auto")
  int root = 0;
  const void* in = nullptr;
  void* out = nullptr;
  size_t count = 0;
  uint64_t shape = 0;  // ranks must give the same; see CallRecord
};

class Communicator {
 public:
  // Meets the other ranks through the store; returns when all have attached. Throws Error.
  Communicator(Store& store, int rank, int world, const Config& config, std::chrono::milliseconds timeout);
  ~Communicator();  // as close()

  // Blocks until done. Errors of the collective are terminal for the communicator, kUsage errors are not. `before` and
  // `after` belong to the call's turn; `after` is left out if the call failed.
  void run(const Call& call, const std::function<void()>& before = {}, const std::function<void()>& after = {});
  // Returns at once. When it is the call's turn a thread of the communicator's calls `before`, runs it, and calls `done`.
  void enqueue(const Call& call, std::function<void()> before, std::function<void(std::exception_ptr)> done);

  // Whether this thread is inside a call of the communicator with this `turn()`: it may not wait for another one.
  static bool inside(const void* turn);
  const void* turn() const;

  // Ends what is queued, tells the peers, gives everything back. Idempotent. Only tensors in the heap, while there are
  // any, keep the memory mapped.
  void close();
  // Makes running and later calls fail on all ranks, with this text.
  void abort(const std::string& why);

  // Memory that peers map; freed with the last copy of the pointer, also after close(). Throws Error when the heap is
  // full.
  std::shared_ptr<void> allocate(size_t bytes);

  int rank() const;
  int world() const;
  bool closed() const;
  const Geometry& geometry() const;
  size_t footprint() const;  // bytes of memory this rank has given: scratch until closed, and user tensors in the heap
  std::chrono::milliseconds timeout() const;
  void set_timeout(std::chrono::milliseconds timeout);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace pycoll::cpu
