// What the CUDA side offers to csrc/torch: plain data in, an error code out. No torch, and no CUDA header either.
#pragma once

#include "algorithms/links.h"
#include "core/layout.h"
#include "core/window.h"

namespace pycoll::cuda_device {

constexpr int kMaxRanks = 16;
// Of a block: leaves 255 registers, so that the kernel that holds all algorithms spills none.
constexpr int kThreads = 256;

enum Outcome : uint32_t { kRunning, kAborted, kTimedOut };

// Written by the host (abort) or by the first block that fails; in host memory that the device maps.
struct Status {
  uint32_t outcome;
  int32_t rank;  // for whom a block waited when it timed out
};

// One rank of a group whose ranks share a GPU and a process. Everything it points to is device memory.
struct GroupRank {
  PeerTable table;
  WindowState* windows;  // [channels]
  ChannelLinks* links;   // [channels], made by prepare_group
};

// An all-reduce as all ranks of a group make it. By value, so that a captured graph holds all it needs.
struct GroupCall {
  const GroupRank* ranks;  // [world], device memory
  int world;
  int channels;       // blocks a rank
  CallRecord record;  // without offsets: every tensor can be read where it lies
  const void* in[kMaxRanks];
  void* out[kMaxRanks];
  Status* status;
  uint64_t timeout_ns;
};

// Builds the connections of every rank and channel on the device. Returns a cudaError_t.
int prepare_group(const GroupRank* ranks, int world, int channels, void* stream);

// How many blocks of the all-reduce the current device can hold at once. Returns a cudaError_t.
int resident_blocks(int* blocks);

// All ranks' blocks in one cooperative launch: they are on the GPU together, so their spinning waits make progress.
// Returns a cudaError_t; fails, without launching, if the blocks do not all fit.
int all_reduce_group(const GroupCall& call, void* stream);

}  // namespace pycoll::cuda_device
