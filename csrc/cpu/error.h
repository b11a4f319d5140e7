// The errors a communicator raises. csrc/torch turns them into pycoll.errors of the same names.
#pragma once

#include <stdexcept>
#include <string>

namespace pycoll::cpu {

enum class ErrorKind : int {
  kError = 1,    // anything else: closed, forked, aborted, out of memory
  kMismatch,     // ranks made different calls
  kPeerLost,     // a rank died, or left
  kTimeout,      // a rank did not come in time
  kUnsupported,  // not something pycoll does
  kUsage,        // a bad argument of this rank alone: the communicator stays usable
};

// The class of pycoll/errors.py.
constexpr const char* name(ErrorKind kind) {
  constexpr const char* names[] = {
      "Error", "Error", "MismatchError", "PeerLostError", "TimeoutError", "UnsupportedError", "UsageError"};
  const int i = static_cast<int>(kind);  // which may come out of a peer's memory
  return i >= 0 && i < 7 ? names[i] : names[0];
}

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& what, int rank = -1) : std::runtime_error(what), kind(kind), rank(rank) {}

  ErrorKind kind;
  int rank;  // the rank to blame, -1 if none
};

}  // namespace pycoll::cpu
