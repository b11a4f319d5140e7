// How a rank carries out a collective: the entry, where the records of all ranks are compared, the channels, and how it
// ends on all ranks (csrc/README.md, W3, F2, F5, H1).
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "algorithms/links.h"
#include "core/channel.h"
#include "core/window.h"
#include "cpu/call.h"
#include "cpu/executor.h"
#include "cpu/lanes.h"
#include "cpu/recorder.h"
#include "cpu/wait.h"

namespace pycoll::cpu {

// Of one communicator. One call at a time; who makes it is in turn.
class Collectives {
 public:
  // What is referred to lives until the last call has ended.
  Collectives(const Attachment& attachment, const Heap& heap, const Watch& watch);

  // Blocks until done. `in_caller`: this is the thread that called pycoll, which lets signals in. What it throws the other
  // ranks know.
  void execute(const Call& call, bool in_caller);
  void stop();  // the threads of the channels; no call runs any more

  // Whatever goes wrong in `f` is told to the peers, and to this rank's other channels, at once; it ends the communicator.
  template <class F>
  std::exception_ptr guarded(const F& f) const {
    try {
      f();
      return nullptr;
    } catch (...) {
      return watch_.fail(std::current_exception(), "in a collective");
    }
  }

 private:
  void collective(const Call& call, const CallRecord& mine, int channels, bool in_caller);
  void run_lane(int channel, int channels, const CallRecord& mine, const Operation& op,
                std::chrono::milliseconds timeout, std::span<const std::byte> streamed);
  template <class Enter>
  void run_channel(Executor& exec, const Operation& op, int channel, int channels, const CallRecord& mine,
                   const Enter& enter);
  template <class Enter>
  void meet(Executor& exec, Operation op, const CallRecord& mine, Meeting& meeting, const Enter& enter);
  Executor executor(const CallRecord& mine, std::chrono::milliseconds timeout, bool in_caller, Mover* mover,
                    std::span<const std::byte> streamed) const;
  int channels_for(const CallRecord& r) const;
  void compare_records(const CallRecord& mine);

  const Attachment& a_;
  const Heap& heap_;
  const Watch& watch_;
  const PeerTable table_;
  const int rank_, world_, spins_;
  Recorder recorder_;
  std::vector<WindowState> windows_;
  std::vector<std::unique_ptr<ChannelLinks>> links_;
  std::vector<CallRecord> records_;  // of all ranks, in the last call
  uint64_t sequence_ = 0;
  Lanes lanes_;
};

}  // namespace pycoll::cpu
