// The kernels of csrc/cuda under the test double, as host functions: the same blocks, run by host threads. See fake.h.
#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <thread>
#include <vector>

#include "block_executor.h"
#include "cuda/adam.h"
#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/pack.h"
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

void run_adam(const AdamLaunch& launch) {
  if (skips(launch)) return;
  for (uint32_t c = 0; c < launch.chunk_count; ++c) {
    const AdamTarget& target = launch.targets[launch.chunks[c].tensor];
    const AdamPiece piece = piece_of(target, launch.chunks[c].index);
    dispatch_float(target.dtype, [&](auto p) {
      dispatch_float(target.grad_dtype, [&](auto g) {
        adam_strided<typename decltype(p)::type, typename decltype(g)::type>(OneThread{}, piece,
                                                                             scalars_of(launch, target));
      });
    });
  }
  for (uint32_t k = 0; k < launch.target_count; ++k) *launch.targets[k].step += 1;
}

void run_squares(const SquaresLaunch& launch) {
  double sum = 0;
  for (uint32_t c = 0; c < launch.chunk_count; ++c) {
    const SquaresSource& source = launch.sources[launch.chunks[c].tensor];
    const size_t begin = launch.chunks[c].index * kChunk;
    sum += dispatch_float(source.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return squares_strided<T>(OneThread{}, static_cast<const std::byte*>(source.data) + begin * sizeof(T),
                                std::min(kChunk, source.count - begin));
    });
  }
  *launch.sum = sum;
}

void run_clip(const ClipLaunch& launch) {
  const Clipped c = clip_to_norm(std::accumulate(launch.sums, launch.sums + launch.count, 0.0),
                                 value_or(launch.scale, 1), launch.max_norm);
  launch.result[0] = c.norm;
  launch.result[1] = c.factor;
  launch.result[2] = c.found_inf;
}

// A thread alone, as a warp.
struct LoneWarp : OneThread {
  static constexpr unsigned kThreads = 1;
  size_t index() const { return 0; }
  size_t groups() const { return 1; }
  int32_t largest(int32_t x) const { return x; }
};

void run_pack(const PackLaunch& launch) {
  bool finite = true;
  for (uint32_t c = 0; c < launch.chunk_count; ++c) {
    const PackPiece piece = piece_of(launch, launch.chunks[c]);
    if (piece.grad == nullptr) {
      pack_zeros(OneThread{}, launch.wire, piece);
      continue;
    }
    dispatch_float(launch.sources[launch.chunks[c].tensor].dtype, [&](auto g) {
      using G = typename decltype(g)::type;
      if (launch.wire == Wire::kInt8) {
        finite &= pack_int8_strided<G>(LoneWarp{}, piece, launch.factor);
        return;
      }
      dispatch_float(dtype_of(launch.wire), [&](auto w) {
        finite &= pack_strided<G, typename decltype(w)::type>(OneThread{}, piece, launch.factor);
      });
    });
  }
  if (launch.found_inf != nullptr) *launch.found_inf = finite ? 0.0f : 1.0f;
}

enum class Kernel {
  kNone,
  kPrepare,
  kStep,
  kWindows,
  kChannels,
  kWords,
  kExchange,
  kAdam,
  kSquares,
  kClip,
  kStore,
  kPack,
  kAverage
};

Kernel kernel_of(const char* name) {
  if (std::strstr(name, "11cuda_device") == nullptr) return Kernel::kNone;
  if (std::strstr(name, "prepare_kernel")) return Kernel::kPrepare;
  if (std::strstr(name, "step_kernel")) return Kernel::kStep;
  if (std::strstr(name, "exchange_kernel")) return Kernel::kExchange;
  if (std::strstr(name, "adam_kernel")) return Kernel::kAdam;
  if (std::strstr(name, "squares_kernel")) return Kernel::kSquares;
  if (std::strstr(name, "clip_kernel")) return Kernel::kClip;
  if (std::strstr(name, "store_kernel")) return Kernel::kStore;
  if (std::strstr(name, "pack_kernel")) return Kernel::kPack;
  if (std::strstr(name, "average_kernel")) return Kernel::kAverage;
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
    case Kernel::kAdam:
      run_adam(*static_cast<const AdamLaunch*>(args[0]));
      return 0;
    case Kernel::kSquares:
      run_squares(*static_cast<const SquaresLaunch*>(args[0]));
      return 0;
    case Kernel::kClip:
      run_clip(*static_cast<const ClipLaunch*>(args[0]));
      return 0;
    case Kernel::kStore:
      std::memcpy(*static_cast<void**>(args[0]), static_cast<const TablePart*>(args[1])->bytes,
                  *static_cast<size_t*>(args[2]));
      return 0;
    case Kernel::kPack:
      run_pack(*static_cast<const PackLaunch*>(args[0]));
      return 0;
    case Kernel::kAverage: {
      const auto& a = *static_cast<const AverageLaunch*>(args[0]);
      average_int8_strided(OneThread{}, a.wires, a.world, a.units, a.to);
      return 0;
    }
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
    case Kernel::kAdam:
      return index == 0 ? sizeof(AdamLaunch) : 0;
    case Kernel::kSquares:
      return index == 0 ? sizeof(SquaresLaunch) : 0;
    case Kernel::kClip:
      return index == 0 ? sizeof(ClipLaunch) : 0;
    case Kernel::kStore:
      return index == 0 ? sizeof(void*) : index == 1 ? sizeof(TablePart) : index == 2 ? sizeof(size_t) : 0;
    case Kernel::kPack:
      return index == 0 ? sizeof(PackLaunch) : 0;
    case Kernel::kAverage:
      return index == 0 ? sizeof(AverageLaunch) : 0;
    default:
      return index == 0 ? sizeof(DeviceCall) : 0;
  }
}

}  // extern "C"
