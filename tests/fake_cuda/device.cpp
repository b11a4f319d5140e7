// Devices, their properties, errors and the entry points of the driver. See fake.h.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "fake.h"

namespace fake_cuda {

namespace {

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;

const std::vector<int>& devices() {
  static const auto* const list = [] {
    auto* found = new std::vector<int>;
    const int count = setting("FAKE_CUDA_DEVICES", 1);
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (visible == nullptr) {
      for (int d = 0; d < count; ++d) found->push_back(d);
      return found;
    }
    for (const char* p = visible; *p != '\0';) {  // as CUDA: the list ends at the first that does not exist
      char* end = nullptr;
      const long d = std::strtol(p, &end, 10);
      if (end == p || d < 0 || d >= count) break;
      found->push_back(static_cast<int>(d));
      p = *end == ',' ? end + 1 : end;
    }
    return found;
  }();
  return *list;
}

bool exists(int d) { return d >= 0 && d < device_count(); }

}  // namespace

int device_count() { return static_cast<int>(devices().size()); }
int current_device() { return device; }
int physical_device(int d) { return exists(d) ? devices()[d] : -1; }
int visible_device(int physical) {
  for (int d = 0; d < device_count(); ++d) {
    if (devices()[d] == physical) return d;
  }
  return -1;
}
int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}
bool verbose() {
  static const bool value = setting("FAKE_CUDA_VERBOSE", 0) != 0;
  return value;
}
cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The numbers of cudaDeviceAttr and CUdevice_attribute are the same.
cudaError_t attribute(int* value, int attribute, int d) {
  if (!exists(d)) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = setting("FAKE_CUDA_MULTIPROCESSORS", 8);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED:
      *value = 0;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrPciBusId:
      *value = physical_device(d) + 1;
      break;
    case cudaDevAttrAsyncEngineCount:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrUnifiedAddressing:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
      *value = 1;
      break;
    default:
      if (verbose()) std::fprintf(stderr, "fake_cuda: device attribute %d is taken to be 0\n", attribute);
      *value = 0;
  }
  return cudaSuccess;
}

}  // namespace fake_cuda

using namespace fake_cuda;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return report(*count > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* d) {
  *d = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
  if (!exists(d)) return report(cudaErrorInvalidDevice);
  device = d;
  return cudaSuccess;
}
cudaError_t cudaInitDevice(int d, unsigned, unsigned) {
  return report(exists(d) ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr, int d) { return report(attribute(value, attr, d)); }
cudaError_t cudaDeviceCanAccessPeer(int* can, int d, int peer) {
  if (!exists(d) || !exists(peer)) return report(cudaErrorInvalidDevice);
  *can = d != peer;
  return cudaSuccess;
}
// Peers always reach one another; that access was enabled before is as with CUDA not known to other threads.
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return report(exists(peer) && peer != device ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return report(exists(peer) ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int d) {
  if (!exists(d)) return report(cudaErrorInvalidDevice);
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02X:00.0", static_cast<unsigned>(physical_device(d) + 1));
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int d) {
  if (!exists(d)) return report(cudaErrorInvalidDevice);
  const auto get = [&](cudaDeviceAttr attr) {
    int value = 0;
    attribute(&value, attr, d);
    return value;
  };
  *prop = {};
  std::strcpy(prop->name, "Fake GPU");
  std::memcpy(prop->uuid.bytes, "fake_cuda device", sizeof(prop->uuid.bytes));
  prop->uuid.bytes[15] = static_cast<char>(physical_device(d));
  size_t available = 0;
  const int before = std::exchange(device, d);
  cudaMemGetInfo(&available, &prop->totalGlobalMem);
  device = before;
  prop->sharedMemPerBlock = static_cast<size_t>(get(cudaDevAttrMaxSharedMemoryPerBlock));
  prop->sharedMemPerBlockOptin = static_cast<size_t>(get(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  prop->sharedMemPerMultiprocessor = static_cast<size_t>(get(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  prop->regsPerBlock = prop->regsPerMultiprocessor = get(cudaDevAttrMaxRegistersPerBlock);
  prop->warpSize = get(cudaDevAttrWarpSize);
  prop->maxThreadsPerBlock = get(cudaDevAttrMaxThreadsPerBlock);
  prop->maxThreadsPerMultiProcessor = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  for (int i = 0; i < 3; ++i) {
    prop->maxThreadsDim[i] = get(static_cast<cudaDeviceAttr>(cudaDevAttrMaxBlockDimX + i));
    prop->maxGridSize[i] = get(static_cast<cudaDeviceAttr>(cudaDevAttrMaxGridDimX + i));
  }
  prop->major = get(cudaDevAttrComputeCapabilityMajor);
  prop->minor = get(cudaDevAttrComputeCapabilityMinor);
  prop->multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  prop->pciBusID = get(cudaDevAttrPciBusId);
  prop->l2CacheSize = 4 << 20;
  prop->totalConstMem = 64 << 10;
  prop->canMapHostMemory = prop->canUseHostPointerForRegisteredMem = prop->hostRegisterSupported = 1;
  prop->concurrentKernels = prop->cooperativeLaunch = prop->unifiedAddressing = prop->streamPrioritiesSupported = 1;
  prop->asyncEngineCount = 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(e) \
  case e:       \
    return #e;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidValue)
    NAME(cudaErrorMemoryAllocation)
    NAME(cudaErrorInvalidMemcpyDirection)
    NAME(cudaErrorInvalidDeviceFunction)
    NAME(cudaErrorNoDevice)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorInvalidConfiguration)
    NAME(cudaErrorInvalidResourceHandle)
    NAME(cudaErrorNotReady)
    NAME(cudaErrorHostMemoryAlreadyRegistered)
    NAME(cudaErrorHostMemoryNotRegistered)
    NAME(cudaErrorCooperativeLaunchTooLarge)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorStreamCaptureUnsupported)
    NAME(cudaErrorStreamCaptureInvalidated)
    NAME(cudaErrorStreamCaptureUnmatched)
    NAME(cudaErrorCapturedEvent)
    NAME(cudaErrorLaunchFailure)
    NAME(cudaErrorIllegalState)
#undef NAME
    default:
      return "another CUDA error";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// The driver is this very library. Where cuda.h gives a function's newest version another name, it is asked for without.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  static void* const self = [] {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&cudaGetDriverEntryPointByVersion), &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  *function = dlsym(self, (std::string(name) + "_v2").c_str());
  if (*function == nullptr) *function = dlsym(self, name);
  if (*function == nullptr && verbose()) std::fprintf(stderr, "fake_cuda: the driver has no %s\n", name);
  if (status != nullptr) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* status) {
  return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, status);
}

}  // extern "C"
