#include "torch/cuda/reserved_blocks.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>

#include "torch/cuda/launcher.h"

namespace pycoll::bindings {

namespace {

std::mutex& reserved_lock() {
  static auto* lock = new std::mutex;  // never destroyed: communicators may outlive static destruction
  return *lock;
}
std::map<int, int>& reserved_blocks() {
  static auto* reserved = new std::map<int, int>;
  return *reserved;
}

}  // namespace

ReservedBlocks::ReservedBlocks(int device, int wish) : device_(device) {
  int resident = 0;
  check_cuda(cuda_device::resident_blocks(&resident), "asking for the number of resident blocks");
  const std::lock_guard guard(reserved_lock());
  const int left = resident - reserved_blocks()[device];
  if (left < 1) {
    throw Error(ErrorKind::kError,
                "pycoll: the communicators on this GPU already hold all the " + std::to_string(resident) +
                    " blocks that fit on it at once: close some, or give them fewer channels (Config.channels)");
  }
  count_ = std::clamp(left / 4, 1, wish);  // leaves some for communicators to come
  reserved_blocks()[device] += count_;
}

ReservedBlocks::~ReservedBlocks() { keep(0); }

void ReservedBlocks::keep(int count) {
  const std::lock_guard guard(reserved_lock());
  reserved_blocks()[device_] -= count_ - count;
  count_ = count;
}

}  // namespace pycoll::bindings
