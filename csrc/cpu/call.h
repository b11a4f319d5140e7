// One collective as this rank calls it, and the record by which it tells the other ranks.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "core/record.h"
#include "cpu/elsewhere.h"
#include "cpu/heap.h"
#include "cpu/recorder.h"
#include "cpu/shard_work.h"

namespace pycoll::cpu {

// Memory is dense; `count` is as in core/record.h, elements_of. What only the root uses is null elsewhere. In place where
// in == out; they must not overlap otherwise (where one holds blocks the other may also be this rank's block of it). An
// all-to-all is never in place.
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
  // All-to-all, instead of `count`: elements to and from each rank [world]. They outlive the call.
  const uint64_t* send_counts = nullptr;
  const uint64_t* recv_counts = nullptr;
  std::chrono::milliseconds timeout{0};  // the longest it waits for other ranks; 0: the communicator's
  // Memory that the CPU does not move (cpu/elsewhere.h): at most one of the two. They outlive the call.
  Mover* mover = nullptr;
  Meeting* meeting = nullptr;
  const ShardWork* work = nullptr;  // of a bucket, whose memory lies in the heap; outlives the call
};

InOut all_to_all_elements(const Call& call, int world);  // the sums of its counts
inline InOut elements_of(const Call& call, int world) {  // of its input and output
  if (call.send_counts) return all_to_all_elements(call, world);
  return elements_of(call.collective, call.count, world);
}

// The output, if nothing of it is in the caches when it is written, and nobody will find it there: when the tensors of all
// ranks do not fit there together.
std::span<const std::byte> too_large_to_cache(const Call& call, int world);

// Throws Error for an algorithm that the CPU has not, and for a bucket that peers cannot reach.
void check_call(const Call& call, const Heap& heap);

// Whether peers may read or write tensors in place in this call, of which `records` are those of all ranks.
bool reaches_into_tensors(const CallRecord& mine, const std::vector<CallRecord>& records);

// `one_shot_max_bytes`: where "auto" goes over to two-shot.
inline CallRecord record_of(const Call& call, uint64_t sequence, int world, const Heap& heap,
                            size_t one_shot_max_bytes) {
  const size_t element = size_of(call.dtype);
  const InOut elements = elements_of(call, world);
  CallRecord r{};
  r.sequence = sequence;
  r.count = call.count;
  // Ranks that meet share a process: rank 0 finds their calls there.
  r.in_offset = call.meeting ? reinterpret_cast<uint64_t>(&call) : heap.offset_of(call.in, elements.in * element);
  r.out_offset = call.meeting ? kNotMapped : heap.offset_of(call.out, elements.out * element);
  r.root = call.root;
  r.collective = call.collective;
  r.dtype = call.dtype;
  r.op = call.op;
  r.shape = call.shape;
  r.algorithm = Algorithm::kDirect;
  if (call.collective == Collective::kAllReduce) {
    const bool small = call.count * element <= one_shot_max_bytes;
    r.algorithm = call.algorithm.value_or(small ? Algorithm::kOneShot : Algorithm::kTwoShot);
  }
  return r;
}

// What the recorder keeps of a call.
inline Entry entry_of(const Call& call, const CallRecord& r, int world, int channels, bool in_caller) {
  Entry e;
  e.sequence = r.sequence;
  e.count = r.count;
  if (call.send_counts) {
    const InOut elements = elements_of(call, world);
    e.count = std::max(elements.in, elements.out);
  }
  e.shape = r.shape;
  e.peer = r.root;
  e.deed = Deed::kCollective;
  e.collective = r.collective;
  e.algorithm = r.algorithm;
  e.dtype = r.dtype;
  e.op = r.op;
  e.channels = static_cast<uint8_t>(channels);
  const bool on_gpu = call.mover != nullptr || call.meeting != nullptr;
  e.flags = static_cast<uint8_t>((in_caller ? 0 : Entry::kQueued) | (on_gpu ? Entry::kOnGpu : 0));
  return e;
}

}  // namespace pycoll::cpu
