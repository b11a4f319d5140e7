// Memory of a GPU that other processes map: virtual memory management of the CUDA driver, and its multicast objects.
//
// Physical memory is created by its owner, handed over as a file descriptor, and mapped by every rank into a range of
// its own. Legacy IPC handles cannot do that for memory that grows, and break under expandable segments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pycoll::cuda_device {

class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Physical memory on a GPU, or what stands for that of several (multicast). Lives on while somebody maps it.
class Physical {
 public:
  Physical() = default;
  Physical(Physical&& other) noexcept { *this = std::move(other); }
  Physical& operator=(Physical&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Physical();

  static Physical create(int device, size_t bytes);      // a multiple of granularity()
  static Physical import(int descriptor, size_t bytes);  // what share() gave in another process; the descriptor stays
  static size_t granularity(int device);                 // bytes

  // Joins the memory of `devices` GPUs; see multicast_granularity. Each GPU is added, by its own process, before any
  // binds: binding waits for all.
  static Physical create_multicast(int devices, size_t bytes);
  static size_t multicast_granularity(int devices);  // bytes; 0: `device` has no multicast
  static bool has_multicast(int device);
  void add_device(int device) const;
  void bind(const Physical& memory) const;  // of a device that was added, at offset 0

  int share() const;  // a descriptor, for the caller to close
  size_t bytes() const { return bytes_; }
  explicit operator bool() const { return bytes_ > 0; }

 private:
  Physical(uint64_t handle, size_t bytes) : handle_(handle), bytes_(bytes) {}
  friend class Range;

  uint64_t handle_ = 0;
  size_t bytes_ = 0;
};

// A range of addresses of one GPU's process, in which physical memory is mapped from the start on.
class Range {
 public:
  Range() = default;
  Range(int device, size_t bytes);
  Range(Range&& other) noexcept { *this = std::move(other); }
  Range& operator=(Range&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(base_, other.base_);
    std::swap(bytes_, other.bytes_);
    std::swap(parts_, other.parts_);
    return *this;
  }
  ~Range();

  void append(const Physical& memory);  // readable and writable by the GPU; stays until the end
  std::byte* data() const { return reinterpret_cast<std::byte*>(base_); }
  size_t mapped() const { return std::accumulate(parts_.begin(), parts_.end(), size_t{0}); }

 private:
  int device_ = 0;
  uint64_t base_ = 0;
  size_t bytes_ = 0;
  std::vector<size_t> parts_;  // bytes of what is mapped, one after another
};

}  // namespace pycoll::cuda_device
