// What the CUDA side offers to csrc/torch: plain data in, an error code out. No torch, and no CUDA header either.
#pragma once

#include "algorithms/links.h"
#include "core/layout.h"
#include "core/window.h"

namespace pycoll::cuda_device {

struct Status;

// One rank of a group whose ranks share a GPU and a process. Everything it points to is device memory (the status:
// host-mapped).
struct GroupRank {
  PeerTable table;
  WindowState* windows;       // [channels]
  ChannelLinks* links;        // [channels], made by prepare_group
  const CallRecord* records;  // [world], of this call
  const void* in;
  void* out;
};

struct GroupCall {
  const GroupRank* ranks;  // [world], device memory
  int world;
  int channels;  // blocks a rank
  CallRecord record;
  Status* status;
  uint64_t timeout_ns;
};

constexpr int kThreads =
    256;  // of a block: leaves 255 registers, so that the kernel that holds all algorithms spills none

// Builds the connections of every rank and channel on the device. Returns a cudaError_t.
int prepare_group(const GroupRank* ranks, int world, int channels, void* stream);

// All ranks' blocks in one cooperative launch: they are on the GPU together, so their spinning waits make progress.
// Returns a cudaError_t; fails, without launching, if the blocks do not all fit.
int all_reduce_group(const GroupCall& call, void* stream);

}  // namespace pycoll::cuda_device
