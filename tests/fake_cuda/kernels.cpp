// The kernels of csrc/cuda under the test double, as host functions: the same blocks, run by host threads. See fake.h.
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "block_executor.h"
#include "cuda/block.h"
#include "cuda/launch.h"
#include "fake.h"

namespace {

using namespace pycoll;
using namespace pycoll::cuda_device;

constexpr int kBlockThreads = 2;

template <Family kOfKernel>
void run_collective(const DeviceCall& call, const DeviceCounts* counts, dim3 grid) {
  struct Block {
    HostBlock group{kBlockThreads};
    CallRecord records[kMaxRanks];
  };
  std::deque<Block> blocks(grid.x * grid.y);
  std::vector<std::thread> threads;
  for (size_t b = 0; b < blocks.size(); ++b) {
    for (int t = 0; t < kBlockThreads; ++t) {
      threads.emplace_back([&, b, t] {
        const int index = static_cast<int>(b / grid.x), channel = static_cast<int>(b % grid.x);
        HostBlockExecutor exec(blocks[b].group, t, call.record.dtype, call.record.op, call.ranks[index],
                               call.timeout_ns);
        run_block<kOfKernel>(exec, call, counts, index, channel, blocks[b].records);
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

void run_step(const StepCall& call) {
  combine_any(
      OneThread{}, call.dtype, call.op,
      {call.dst, call.dst_count, call.src, call.src_count, call.wire_sources, call.final, call.world, call.count});
}

enum class Kernel { kNone, kPrepare, kStep, kWindows, kChannels, kWords, kExchange };

Kernel kernel_of(const char* name) {
  if (std::strstr(name, "11cuda_device") == nullptr) return Kernel::kNone;
  if (std::strstr(name, "prepare_kernel")) return Kernel::kPrepare;
  if (std::strstr(name, "step_kernel")) return Kernel::kStep;
  if (std::strstr(name, "exchange_kernel")) return Kernel::kExchange;
  const char* family = std::strstr(name, "collective_kernel") ? std::strstr(name, "FamilyE") : nullptr;
  if (family == nullptr) return Kernel::kNone;
  constexpr Kernel kOf[] = {Kernel::kWindows, Kernel::kChannels, Kernel::kWords};
  return kOf[family[7] - '0'];
}

}  // namespace

extern "C" {

int fake_cuda_run_kernel(const char* name, dim3 grid, dim3, void** args, size_t) {
  switch (kernel_of(name)) {
    case Kernel::kPrepare: {
      const auto* ranks = *static_cast<const DeviceRank**>(args[0]);
      for (unsigned r = 0; r < grid.x; ++r) {
        for (int c = 0; c < *static_cast<int*>(args[1]); ++c) new (&ranks[r].links[c]) ChannelLinks(ranks[r].table, c);
      }
      return 0;
    }
    case Kernel::kStep:
      run_step(*static_cast<const StepCall*>(args[0]));
      return 0;
    case Kernel::kWindows:
      run_collective<Family::kWindow>(*static_cast<const DeviceCall*>(args[0]), nullptr, grid);
      return 0;
    case Kernel::kChannels:
      run_collective<Family::kChannel>(*static_cast<const DeviceCall*>(args[0]), nullptr, grid);
      return 0;
    case Kernel::kWords:
      run_collective<Family::kWords>(*static_cast<const DeviceCall*>(args[0]), nullptr, grid);
      return 0;
    case Kernel::kExchange:
      run_collective<Family::kExchange>(*static_cast<const DeviceCall*>(args[0]),
                                        static_cast<const DeviceCounts*>(args[1]), grid);
      return 0;
    case Kernel::kNone:
      break;
  }
  return fake_cuda::kUnknownKernel;
}

size_t fake_cuda_argument_bytes(const char* name, int index) {
  switch (kernel_of(name)) {
    case Kernel::kNone:
      return 0;
    case Kernel::kPrepare:
      return index == 0 ? sizeof(void*) : index == 1 ? sizeof(int) : 0;
    case Kernel::kStep:
      return index == 0 ? sizeof(StepCall) : 0;
    case Kernel::kExchange:
      return index == 0 ? sizeof(DeviceCall) : index == 1 ? sizeof(DeviceCounts) : 0;
    default:
      return index == 0 ? sizeof(DeviceCall) : 0;
  }
}

}  // extern "C"
