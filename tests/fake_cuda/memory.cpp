// Device and pinned memory, copies. See fake.h.
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

#include "fake.h"

namespace fake_cuda {

namespace {

std::mutex mutex;
auto& ranges = *new std::map<const std::byte*, Range>;  // by where they begin; never destroyed: threads outlive main
auto& used = *new std::map<int, size_t>;                // bytes a device

size_t capacity() { return static_cast<size_t>(setting("FAKE_CUDA_MEMORY_MIB", 16 << 10)) << 20; }

void* map_anonymous(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// What real hardware would reject or fault at: a copy that says "device" but reaches outside of any allocation.
bool is_device(const void* p, size_t bytes) { return find_range(p, bytes, nullptr); }
bool is_pinned(const void* p, size_t bytes) {
  Range range;
  return find_range(p, bytes, &range) && range.kind != Kind::kDevice;
}
bool is_pageable(const void* p) { return !find_range(p, 1, nullptr); }

cudaError_t copy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
  if (bytes == 0) return cudaSuccess;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if ((to_device && !is_device(dst, bytes)) || (from_device && !is_device(src, bytes))) return cudaErrorInvalidValue;
  const bool pageable = is_pageable(dst) || is_pageable(src);
  const cudaError_t error = submit(stream, [=] {
    std::memmove(dst, src, bytes);
    return cudaSuccess;
  });
  if (error != cudaSuccess || !(wait || pageable)) return error;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capturing);
  return capturing == cudaStreamCaptureStatusNone ? wait_for(stream) : cudaSuccess;
}

cudaError_t set(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!is_device(p, bytes)) return cudaErrorInvalidValue;
  return submit(stream, [=] {
    std::memset(p, value, bytes);
    return cudaSuccess;
  });
}

}  // namespace

void add_range(const void* begin, Range range) {
  std::lock_guard lock(mutex);
  ranges[static_cast<const std::byte*>(begin)] = range;
}
void remove_range(const void* begin) {
  std::lock_guard lock(mutex);
  ranges.erase(static_cast<const std::byte*>(begin));
}
bool find_range(const void* p, size_t bytes, Range* found, const void** begin) {
  std::lock_guard lock(mutex);
  auto it = ranges.upper_bound(static_cast<const std::byte*>(p));
  if (it == ranges.begin()) return false;
  --it;
  const std::byte* const last = static_cast<const std::byte*>(p) + bytes;
  const auto first = it;
  const std::byte* end = it->first + it->second.bytes;
  if (static_cast<const std::byte*>(p) >= end) return false;
  while (end < last) {  // adjacent mappings are as good as one
    if (++it == ranges.end() || it->first != end || it->second.kind != first->second.kind) return false;
    end += it->second.bytes;
  }
  if (found != nullptr) *found = first->second;
  if (begin != nullptr) *begin = first->first;
  return true;
}
bool reserve_memory(int device, size_t bytes) {
  std::lock_guard lock(mutex);
  if (bytes > capacity() - used[device]) return false;
  used[device] += bytes;
  return true;
}
void release_memory(int device, size_t bytes) {
  std::lock_guard lock(mutex);
  used[device] -= bytes;
}

}  // namespace fake_cuda

using namespace fake_cuda;

extern "C" {

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  std::lock_guard lock(mutex);
  *total = capacity();
  *available = capacity() - used[current_device()];
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  FAIL_IN_CAPTURE();
  if (bytes == 0) return cudaSuccess;
  const int device = current_device();
  if (!reserve_memory(device, bytes)) return report(cudaErrorMemoryAllocation);
  *p = map_anonymous(bytes);
  if (*p == nullptr) {
    release_memory(device, bytes);
    return report(cudaErrorMemoryAllocation);
  }
  add_range(*p, {Kind::kDevice, device, bytes});
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  FAIL_IN_CAPTURE();
  if (p == nullptr) return cudaSuccess;
  Range range;
  const void* begin = nullptr;
  if (!find_range(p, 1, &range, &begin) || begin != p || range.kind != Kind::kDevice) {
    return report(cudaErrorInvalidValue);
  }
  wait_for_device(range.device);
  remove_range(p);
  release_memory(range.device, range.bytes);
  munmap(p, range.bytes);  // whoever still uses it is told by a signal
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  FAIL_IN_CAPTURE();
  *p = bytes == 0 ? nullptr : map_anonymous(bytes);
  if (bytes == 0) return cudaSuccess;
  if (*p == nullptr) return report(cudaErrorMemoryAllocation);
  add_range(*p, {Kind::kHost, current_device(), bytes});
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
cudaError_t cudaFreeHost(void* p) {
  FAIL_IN_CAPTURE();
  if (p == nullptr) return cudaSuccess;
  Range range;
  const void* begin = nullptr;
  if (!find_range(p, 1, &range, &begin) || begin != p || range.kind != Kind::kHost) {
    return report(cudaErrorInvalidValue);
  }
  for (int d = 0; d < device_count(); ++d) wait_for_device(d);
  remove_range(p);
  munmap(p, range.bytes);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  FAIL_IN_CAPTURE();
  if (p == nullptr || bytes == 0) return report(cudaErrorInvalidValue);
  if (find_range(p, 1, nullptr) || find_range(static_cast<std::byte*>(p) + bytes - 1, 1, nullptr)) {
    return report(cudaErrorHostMemoryAlreadyRegistered);
  }
  add_range(p, {Kind::kRegistered, current_device(), bytes});
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  FAIL_IN_CAPTURE();
  Range range;
  const void* begin = nullptr;
  if (!find_range(p, 1, &range, &begin) || begin != p || range.kind != Kind::kRegistered) {
    return report(cudaErrorHostMemoryNotRegistered);
  }
  remove_range(p);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  if (!is_pinned(host, 1)) return report(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  if (!is_pinned(host, 1)) return report(cudaErrorInvalidValue);
  *flags = cudaHostAllocMapped;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  *attributes = {};
  Range range;
  if (!find_range(p, 1, &range)) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    return cudaSuccess;
  }
  attributes->type = range.kind == Kind::kDevice ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->device = range.device;
  attributes->devicePointer = const_cast<void*>(p);
  if (range.kind != Kind::kDevice) attributes->hostPointer = const_cast<void*>(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return report(copy(dst, src, bytes, kind, stream, false));
}
cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
  FAIL_IN_CAPTURE();
  return report(copy(dst, src, bytes, kind, nullptr, true));
}
cudaError_t cudaMemcpyPeerAsync(void* dst, int, const void* src, int, size_t bytes, cudaStream_t stream) {
  return report(copy(dst, src, bytes, cudaMemcpyDeviceToDevice, stream, false));
}
cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t y = 0; y < height; ++y) {
    const cudaError_t error = copy(static_cast<std::byte*>(dst) + y * dst_pitch,
                                   static_cast<const std::byte*>(src) + y * src_pitch, width, kind, stream, false);
    if (error != cudaSuccess) return report(error);
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  return report(set(p, value, bytes, stream));
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) { return report(set(p, value, bytes, nullptr)); }

}  // extern "C"
