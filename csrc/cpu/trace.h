// What a communicator tells of itself: lines of the log, and the trace, which is what the recorders of all its ranks hold,
// as text. A rank that fails leaves its trace in the folder that the environment variable PYCOLL_TRACE names.
#pragma once

#include <optional>
#include <string>

#include "cpu/attach.h"
#include "cpu/error.h"
#include "cpu/log.h"
#include "cpu/recorder.h"
#include "cpu/wait.h"

namespace pycoll::cpu {

class Tracer {
 public:
  // What is referred to lives as long as this is used.
  Tracer(const Attachment& attachment, const Watch& watch);

  // As JSON (pycoll/trace/dump.py reads it): who asks, how it failed if it did, and of every rank, as this one sees it in
  // shared memory, what has become of it and its last calls, messages and launches. At most a few MiB, at 256 entries a rank some 100 KiB each. Any thread
  // may ask, also while calls hang.
  std::string trace() const;

  // This rank has failed: says so in the log, and leaves the trace in a file. What goes wrong with that is only said.
  void tell_failure(const Error& error) const noexcept;
  void tell_closed() const;

 private:
  template <class Text>
  void say(LogLevel level, const Text& text) const {
    log(level, a_.names, a_.rank, a_.geometry.world, text);
  }
  std::optional<Error> failure_of(int rank) const;
  const char* state_of_rank(int rank) const;
  std::string leave_file() const;

  const Attachment& a_;
  const Watch& watch_;
  std::string folder_;  // none: no files
};

}  // namespace pycoll::cpu
