// What a communicator and its ranks are called where people read of them: in errors, in the log, in traces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pycoll::cpu {

struct Names {
  std::string group = "communicator";
  // [world]: the number of each rank among all of the program, as torch.distributed counts them. Empty: the same, or not
  // known.
  std::vector<uint64_t> global_ranks;

  // "rank 1", or "rank 1 (global rank 3)" where the two differ.
  std::string rank(int r) const { return "rank " + number(r); }
  std::string number(int r) const;                        // the same without "rank "
  std::string ranks(const std::vector<int>& list) const;  // "ranks 1, 2"; of many the first 16
  // The numbers of several; "..." for those after the first `most`.
  std::string numbers(const std::vector<int>& list, const char* separator = ", ", size_t most = SIZE_MAX) const;
};

}  // namespace pycoll::cpu
