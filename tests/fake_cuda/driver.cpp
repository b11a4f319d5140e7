// The driver's functions: virtual memory management over memfd and mmap, so that processes share "device memory" by file
// descriptor as they do with CUDA, and the little else that torch asks for. See fake.h.
//
// Stricter than mmap where the driver is: sizes are multiples of the granularity, a mapping begins at offset 0 of its
// allocation, nothing can be reached before cuMemSetAccess, and a reservation is given back whole and unmapped.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <string>

#include "fake.h"

namespace fake_cuda {

namespace {

struct Allocation {
  int fd;
  size_t bytes;
  int physical;  // device: the ordinal may differ between the processes that share it
  bool imported;
  bool shareable;
  int references;  // handles and mappings
};

struct Mapping {
  size_t bytes;
  Allocation* allocation;
};

std::mutex mutex;
auto& reservations = *new std::map<CUdeviceptr, size_t>;
auto& mappings = *new std::map<CUdeviceptr, Mapping>;

constexpr char kName[] = "fake_cuda:";  // of a memfd, the physical device follows: how an importer knows what it holds

Allocation* allocation(CUmemGenericAllocationHandle handle) { return reinterpret_cast<Allocation*>(handle); }
CUmemGenericAllocationHandle handle_of(Allocation* a) { return reinterpret_cast<CUmemGenericAllocationHandle>(a); }
int device_of(const Allocation& a) {
  const int device = visible_device(a.physical);
  return device >= 0 ? device : current_device();
}
bool aligned(size_t bytes) { return bytes != 0 && bytes % kGranularity == 0; }
void* pointer(CUdeviceptr p) { return reinterpret_cast<void*>(p); }

void drop(Allocation* a) {
  if (--a->references > 0) return;
  if (!a->imported) release_memory(visible_device(a->physical), a->bytes);
  close(a->fd);
  delete a;
}

// Whether [begin, begin + bytes) consists of whole mappings.
bool is_mapped(CUdeviceptr begin, size_t bytes) {
  const CUdeviceptr end = begin + bytes;
  while (begin < end) {
    const auto it = mappings.find(begin);
    if (it == mappings.end()) return false;
    begin += it->second.bytes;
  }
  return begin == end;
}

bool overlaps_mapping(CUdeviceptr begin, size_t bytes) {
  const auto it = mappings.lower_bound(begin + bytes);
  if (it == mappings.begin()) return false;
  const auto before = std::prev(it);
  return before->first + before->second.bytes > begin;
}

bool is_reserved(CUdeviceptr begin, size_t bytes) {
  auto it = reservations.upper_bound(begin);
  if (it == reservations.begin()) return false;
  --it;
  return begin + bytes <= it->first + it->second;
}

}  // namespace

}  // namespace fake_cuda

using namespace fake_cuda;

// As FAIL_IN_CAPTURE. Which functions of the driver may spoil a capture is written nowhere: here it is those that share
// memory or give it back. Taking and mapping it spoils none: torch's expandable segments grow while they are captured.
#define DRIVER_FAILS_IN_CAPTURE() \
  if (const cudaError_t unsafe = unsafe_in_capture(); unsafe != cudaSuccess) return static_cast<CUresult>(unsafe)

extern "C" {

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* prop,
                     unsigned long long flags) {
  if (!aligned(bytes) || flags != 0 || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const auto types = static_cast<unsigned>(prop->requestedHandleTypes);
  if ((types & ~unsigned{CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR}) != 0) return CUDA_ERROR_NOT_SUPPORTED;
  const int physical = physical_device(prop->location.id);
  if (physical < 0) return CUDA_ERROR_INVALID_DEVICE;
  if (!reserve_memory(prop->location.id, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  const int fd = memfd_create((kName + std::to_string(physical)).c_str(), MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    if (fd >= 0) close(fd);
    release_memory(prop->location.id, bytes);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *handle = handle_of(new Allocation{fd, bytes, physical, false, types != 0, 1});
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  DRIVER_FAILS_IN_CAPTURE();
  std::lock_guard lock(mutex);
  drop(allocation(handle));
  return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop, CUmemGenericAllocationHandle handle) {
  const Allocation& a = *allocation(handle);
  *prop = {};
  prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop->location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_of(a)}};
  if (a.shareable) prop->requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return CUDA_SUCCESS;
}
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  std::lock_guard lock(mutex);
  const auto p = reinterpret_cast<CUdeviceptr>(address);
  auto it = mappings.upper_bound(p);
  if (it == mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
  --it;
  if (p >= it->first + it->second.bytes) return CUDA_ERROR_INVALID_VALUE;
  ++it->second.allocation->references;
  *handle = handle_of(it->second.allocation);
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  DRIVER_FAILS_IN_CAPTURE();
  const Allocation& a = *allocation(handle);
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || flags != 0 || !a.shareable) return CUDA_ERROR_INVALID_VALUE;
  const int fd = fcntl(a.fd, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(shareable) = fd;
  return CUDA_SUCCESS;
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* shareable,
                                        CUmemAllocationHandleType type) {
  DRIVER_FAILS_IN_CAPTURE();
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  const int given = static_cast<int>(reinterpret_cast<intptr_t>(shareable));
  char target[128] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(given);
  int physical = 0;
  struct stat status;
  if (readlink(link.c_str(), target, sizeof(target) - 1) < 0 ||
      std::sscanf(target, "/memfd:fake_cuda:%d", &physical) != 1 || fstat(given, &status) != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int fd = fcntl(given, F_DUPFD_CLOEXEC, 0);  // the caller closes its own
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *handle = handle_of(new Allocation{fd, static_cast<size_t>(status.st_size), physical, true, true, 1});
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* p, size_t bytes, size_t alignment, CUdeviceptr, unsigned long long flags) {
  if (!aligned(bytes) || flags != 0 || (alignment & (alignment - 1)) != 0) return CUDA_ERROR_INVALID_VALUE;
  if (alignment < kGranularity) alignment = kGranularity;
  const size_t all = bytes + alignment;
  void* begin = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto first = reinterpret_cast<CUdeviceptr>(begin);
  *p = (first + alignment - 1) / alignment * alignment;
  if (*p > first) munmap(begin, *p - first);
  munmap(pointer(*p + bytes), first + all - (*p + bytes));
  std::lock_guard lock(mutex);
  reservations[*p] = bytes;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t bytes) {
  DRIVER_FAILS_IN_CAPTURE();
  std::lock_guard lock(mutex);
  const auto it = reservations.find(p);
  if (it == reservations.end() || it->second != bytes || overlaps_mapping(p, bytes)) return CUDA_ERROR_INVALID_VALUE;
  reservations.erase(it);
  munmap(pointer(p), bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr p, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  std::lock_guard lock(mutex);
  Allocation* a = allocation(handle);
  if (!aligned(bytes) || p % kGranularity != 0 || offset != 0 || flags != 0 || bytes > a->bytes ||
      !is_reserved(p, bytes) || overlaps_mapping(p, bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (mmap(pointer(p), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, a->fd, 0) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  ++a->references;
  mappings[p] = {bytes, a};
  add_range(pointer(p), {Kind::kDevice, device_of(*a), bytes});
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) {
  DRIVER_FAILS_IN_CAPTURE();
  for (int d = 0; d < device_count(); ++d) wait_for_device(d);
  std::lock_guard lock(mutex);
  if (!is_mapped(p, bytes)) return CUDA_ERROR_INVALID_VALUE;
  mmap(pointer(p), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  for (const CUdeviceptr end = p + bytes; p < end;) {
    const auto it = mappings.find(p);
    remove_range(pointer(p));
    p += it->second.bytes;
    drop(it->second.allocation);
    mappings.erase(it);
  }
  return CUDA_SUCCESS;
}
CUresult cuMemSetAccess(CUdeviceptr p, size_t bytes, const CUmemAccessDesc* access, size_t count) {
  std::lock_guard lock(mutex);
  if (!is_mapped(p, bytes)) return CUDA_ERROR_INVALID_VALUE;
  int protection = PROT_NONE;  // of all devices together: there is one address space
  for (size_t i = 0; i < count; ++i) {
    if (access[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
    if (physical_device(access[i].location.id) < 0) return CUDA_ERROR_INVALID_DEVICE;
    if (access[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READ) protection |= PROT_READ;
    if (access[i].flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) protection |= PROT_READ | PROT_WRITE;
  }
  return mprotect(pointer(p), bytes, protection) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr p) {
  Range range;
  const void* begin = nullptr;
  if (!find_range(pointer(p), 1, &range, &begin)) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = reinterpret_cast<CUdeviceptr>(begin);
  if (bytes != nullptr) *bytes = range.bytes;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr p) {
  Range range;
  const void* begin = nullptr;
  if (!find_range(pointer(p), 1, &range, &begin)) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(data) = range.device;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(data) = range.kind == Kind::kDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *static_cast<const void**>(data) = begin;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *static_cast<size_t*>(data) = range.bytes;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}

CUresult cuMemsetD32Async(CUdeviceptr p, unsigned value, size_t count, CUstream stream) {
  if (!find_range(pointer(p), count * sizeof(value), nullptr)) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(submit(stream, [=] {
    for (size_t i = 0; i < count; ++i) static_cast<unsigned*>(pointer(p))[i] = value;
    return cudaSuccess;
  }));
}
CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr p, cuuint32_t value, unsigned) {
  if (!find_range(pointer(p), sizeof(value), nullptr)) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(submit(stream, [=] {
    __atomic_store_n(static_cast<cuuint32_t*>(pointer(p)), value, __ATOMIC_RELEASE);
    return cudaSuccess;
  }));
}

// Devices are their ordinals; a context is its device's, told apart from null.
CUresult cuInit(unsigned) { return device_count() > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDriverGetVersion(int* version) { return static_cast<CUresult>(cudaDriverGetVersion(version)); }
CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return physical_device(ordinal) >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return static_cast<CUresult>(attribute(value, which, device));
}
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  cudaDeviceProp prop;
  const cudaError_t error = cudaGetDeviceProperties(&prop, device);
  if (error == cudaSuccess) *uuid = prop.uuid;
  return static_cast<CUresult>(error);
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current_device()); }
CUresult cuCtxSetCurrent(CUcontext context) {
  if (context == nullptr) return CUDA_SUCCESS;
  return static_cast<CUresult>(cudaSetDevice(static_cast<int>(reinterpret_cast<intptr_t>(context) - 1)));
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}

// The numbers of CUresult and cudaError_t are the same where both have an error.
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

}  // extern "C"
