// What the CUDA side offers to csrc/torch: plain data in, an error code out. No torch, and no CUDA header either.
#pragma once

#include "algorithms/links.h"
#include "core/layout.h"
#include "core/window.h"

namespace pycoll::cuda_device {

constexpr int kMaxRanks = 16;
// Of a block, of which a multiprocessor holds one. The next larger number that counts, 384, leaves 168 registers each,
// and then the largest kernel spills two of them.
constexpr int kThreads = 256;

enum Outcome : uint32_t { kRunning, kAborted, kTimedOut, kMismatched, kCountsDiffer, kLeft };

// Written by the host (to abort) or by the first block that fails; in host memory that the device maps.
struct Report {
  uint32_t outcome;
  int32_t rank;                   // kTimedOut, kLeft: for whom a block waited. kCountsDiffer: who sends
  uint32_t left;                  // written by the host. Bit r: rank r has closed in order
  CallRecord records[kMaxRanks];  // kMismatched: what each rank calls
  int32_t to;                     // kCountsDiffer, with what follows
  uint64_t sent, expected;
};

// A rank whose blocks run on this GPU. Everything it points to is device memory, but for the report.
struct DeviceRank {
  PeerTable table;
  WindowState* windows;  // [channels]
  ChannelLinks* links;   // [channels], made by prepare_ranks
  uint32_t* stopped;     // not 0 once a block has failed: all later waits and moves are skipped
  Report* report;
};

// A call as the ranks on this GPU make it: all ranks of a local group, or the one rank of a process. By value, so that
// a captured graph holds all it needs.
struct DeviceCall {
  const DeviceRank* ranks;  // [ranks_here], device memory
  int ranks_here;
  int channels;       // blocks a rank
  CallRecord record;  // where all ranks are here, without offsets: every tensor can be read where it lies
  const void* in[kMaxRanks];
  void* out[kMaxRanks];
  uint64_t timeout_ns;
};

// What an all-to-all has besides, for each of the ranks on this GPU: elements to and from each rank.
struct DeviceCounts {
  uint64_t send[kMaxRanks][kMaxRanks];
  uint64_t recv[kMaxRanks][kMaxRanks];
};

// One verb of the host-stepped executor: CombineArgs by value.
struct StepCall {
  DType dtype;
  ReduceOp op;
  int dst_count, src_count, world;
  uint32_t wire_sources;
  bool final;
  size_t count;
  const void* src[kMaxRanks + 2];
  void* dst[kMaxRanks + 2];
};

// All of these return a cudaError_t.

// Builds the connections of every rank and channel on the device.
int prepare_ranks(const DeviceRank* ranks, int count, int channels, void* stream);

// How many blocks of a collective the current device can hold at once.
int resident_blocks(int* blocks);

// All blocks in one cooperative launch: they are on the GPU together, so that the spinning waits of ranks that share it
// make progress. Fails, without launching, if they do not all fit.
// `counts`: for an all-to-all.
int launch_collective(const DeviceCall& call, const DeviceCounts* counts, void* stream);

// Reads all sources and writes all destinations, with the whole GPU; waits for nobody.
int launch_step(const StepCall& call, void* stream);

}  // namespace pycoll::cuda_device
