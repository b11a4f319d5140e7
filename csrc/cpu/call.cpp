#include "cpu/call.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "algorithms/call.h"
#include "cpu/error.h"
#include "cpu/os.h"

namespace pycoll::cpu {

InOut all_to_all_elements(const Call& call, int world) {
  return {std::accumulate(call.send_counts, call.send_counts + world, uint64_t{0}),
          std::accumulate(call.recv_counts, call.recv_counts + world, uint64_t{0})};
}

std::span<const std::byte> too_large_to_cache(const Call& call, int world) {
  const InOut elements = elements_of(call, world);
  const size_t in = elements.in * size_of(call.dtype), out = elements.out * size_of(call.dtype);
  const bool read_first = call.in == call.out && in == out && call.collective != Collective::kBroadcast;
  if (read_first || call.out == nullptr || std::max(in, out) * static_cast<size_t>(world) <= last_level_cache())
    return {};
  return {static_cast<const std::byte*>(call.out), out};
}

void check_call(const Call& call, const Heap& heap) {
  if (of_bucket(call.collective)) {
    const auto mapped = [&](const void* p) { return heap.offset_of(p, 1) != kNotMapped; };
    if (!mapped(call.in) || (call.out != nullptr && !mapped(call.out))) {
      throw Error(ErrorKind::kUsage, "pycoll: a bucket's memory must come from this communicator's empty()");
    }
  }
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
