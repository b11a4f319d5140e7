#include "cpu/call.h"

#include <algorithm>
#include <string>

#include "algorithms/call.h"
#include "cpu/error.h"

namespace pycoll::cpu {

void check_algorithm(const Call& call) {
  if (!call.algorithm || call.meeting) return;
  dispatch_call(call.collective, *call.algorithm, [&](auto tag) {
    if constexpr (requires { typename decltype(tag)::type::OnlyOnGpus; }) {
      throw Error(ErrorKind::kUnsupported, std::string("pycoll: ") + name(*call.algorithm) +
                                               " is for ranks whose GPUs reach one another, or that share one in a "
                                               "process: use auto, one_shot, two_shot, ring or tree");
    }
  });
}

bool reaches_into_tensors(const CallRecord& mine, const std::vector<CallRecord>& records) {
  if (mine.collective == Collective::kBarrier || mine.algorithm == Algorithm::kOneShot ||
      mine.algorithm == Algorithm::kRing || mine.algorithm == Algorithm::kTree) {
    return false;
  }
  return std::any_of(records.begin(), records.end(),
                     [](const CallRecord& r) { return r.in_offset != kNotMapped || r.out_offset != kNotMapped; });
}

}  // namespace pycoll::cpu
