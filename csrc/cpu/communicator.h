// A communicator of CPU ranks: collectives on raw memory, in issue order, bounded in time. csrc/torch wraps it.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/attach.h"
#include "cpu/call.h"
#include "cpu/error.h"
#include "cpu/mail.h"

namespace pycoll::cpu {

class Communicator {
  struct Impl;

 public:
  // Meets the other ranks through the store; returns when all have attached. Throws Error.
  Communicator(Store& store, int rank, int world, const Config& config, std::chrono::milliseconds timeout,
               const Names& names = {});
  ~Communicator();  // as close()

  // What runs without others of this rank between: collectives, and what belongs before, between and after them.
  class Runner {
   public:
    void operator()(const Call& call) const;

   private:
    friend class Communicator;
    Runner(Impl& impl, bool in_caller) : impl_(impl), in_caller_(in_caller) {}
    Impl& impl_;
    const bool in_caller_;
  };
  using Turn = std::function<void(const Runner& run)>;

  // Throws Error if no rank could make this call here; the communicator stays usable.
  void check(const Call& call) const;
  // Blocks until done. Whatever a turn throws ends the communicator; kUsage errors of this function do not.
  void run(const Turn& turn);
  void run(const Call& call);  // checked
  // Returns at once. A thread of the communicator's runs the turn when it comes, and then calls `done`.
  void enqueue(Turn turn, std::function<void(std::exception_ptr)> done);
  // By a `done` before it runs what may take long, or may call collectives and wait for them: others go on meanwhile.
  static void hand_on();

  // Whether this thread is inside a turn of the communicator with these `turns()`: it may not wait for another one.
  static bool inside(const void* turns);
  const void* turns() const;

  Mail& mail();  // sends and receives, which neither wait for collectives nor delay them

  // Ends what is queued and what is being sent, tells the peers, gives everything back. Idempotent. Only tensors in the heap, while there are
  // any, keep the memory mapped.
  void close();
  // Makes running and later calls fail on all ranks, with this text.
  void abort(const std::string& why);

  // For who watches calls that do not run here (csrc/torch/cuda), from any thread until `on_close` has run.
  struct Monitor {
    std::function<void()> throw_if_any_rank_is_lost;  // if any has failed, or died without having left
    std::function<uint32_t()> ranks_that_left;        // bit r: rank r has closed in order
    std::function<void(const Error&)> fail;           // makes running and later calls fail on all ranks
  };
  Monitor monitor() const;
  // Called once, by close(), when no call runs any more, and before memory is given back.
  void on_close(std::function<void()> last);

  // What all ranks have done last (cpu/trace.h), as JSON. Throws Error once closed.
  std::string trace() const;
  Recorder& launches() const;  // for who launches collectives on this rank's GPU, one at a time, until on_close

  // The bytes of all ranks, as many of each, in rank order. A collective.
  std::vector<std::string> gather(const std::string& bytes);

  // Every rank's segment as this rank maps it, until closed; for who else is to reach the slots in it.
  const std::vector<std::byte*>& segments() const;
  // Control::mapped_device_heap of `rank` for the heap of `owner`.
  uint64_t& mapped_device_heap(int rank, int owner) const;

  // Memory that peers map; freed with the last copy of the pointer, also after close(). Throws Error when the heap is
  // full.
  std::shared_ptr<void> allocate(size_t bytes);

  int rank() const;
  int world() const;
  const Names& names() const;
  bool closed() const;
  const Geometry& geometry() const;
  // Bytes of memory this rank has given: scratch, lanes as far as they have been used, and messages that lie aside, until
  // closed; and user tensors in the heap.
  size_t footprint() const;
  std::chrono::milliseconds timeout() const;
  void set_timeout(std::chrono::milliseconds timeout);

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace pycoll::cpu
