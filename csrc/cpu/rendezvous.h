// What ranks tell one another through the store while they meet (steps 1 and 3 of cpu/attach.h): that they are here, and
// whether they have reached all others.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cpu/attach.h"
#include "cpu/error.h"

namespace pycoll::cpu {

// What a rank says first.
struct Hello {
  uint64_t protocol;
  char token[33];  // of the rank's DescriptorBox
  uint64_t place;
  int32_t world, cores;
  Config wishes;
};

class Rendezvous {
 public:
  // What is referred to lives as long as this is used. `interrupt` is called now and then and may throw.
  Rendezvous(Store& store, int rank, int world, const Names& names, Clock::time_point deadline,
             const std::function<void()>& interrupt);

  void greet(const Hello& mine);
  void say_reached_all();
  void say_failed(const Error& why);

  // Of all ranks, as soon as they are there. Throws Error: who did not come in time, or means something else.
  std::vector<Hello> hellos();
  // Returns when all have reached all, or throws what one has failed of. `meanwhile` is called now and then.
  void hear_all(const std::function<void()>& meanwhile);
  // Whether a rank has said anything of whom it has reached; throws what it has failed of.
  bool has_reported(int rank);

  std::vector<std::string> keys() const;  // of all ranks, to be erased

 private:
  std::string key(const char* what, int rank) const;
  std::vector<std::string> await_all(const char* what, const std::function<void()>& meanwhile);
  Error missing(const char* what);

  Store& store_;
  const int rank_, world_;
  const Names& names_;
  const Clock::time_point deadline_;
  const std::function<void()>& interrupt_;
  const std::string prefix_;
};

}  // namespace pycoll::cpu
