#include "cuda/memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

namespace pycoll::cuda_device {

namespace {

// The driver is found at run time: pycoll loads where there is none. Null: it does not offer the function.
template <class Function>
Function* find_in_driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr unsigned kVersion = 12030;  // of CUDA: the first with all that is used here
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  return error == cudaSuccess ? reinterpret_cast<Function*>(found) : nullptr;
}

// Peers' memory comes, and tensors go, while other threads may be capturing: called in this mode it spoils no capture.
template <class Function>
struct Relaxed {
  Function* function;
  template <class... Arguments>
  CUresult operator()(Arguments... arguments) const {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    const CUresult result = function(arguments...);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    return result;
  }
};

template <class Function>
Relaxed<Function> driver(const char* name) {
  Function* function = find_in_driver<Function>(name);
  if (function == nullptr) throw DriverError(std::string("pycoll: the CUDA driver offers no ") + name);
  return {function};
}

void check(CUresult result, const char* doing) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  (void)driver<decltype(cuGetErrorString)>("cuGetErrorString")(result, &text);
  throw DriverError(std::string("pycoll: ") + doing + " failed: " + (text ? text : "unknown error of the driver"));
}

#define PYCOLL_DRIVER(function) driver<decltype(function)>(#function)

// In destructors: at the end of the process the driver may be gone, and with it what was to be given back.
template <class Function, class... Arguments>
void give_back(const char* name, Arguments... arguments) {
  if (Function* function = find_in_driver<Function>(name)) (void)Relaxed<Function>{function}(arguments...);
}
#define PYCOLL_GIVE_BACK(function, ...) give_back<decltype(function)>(#function, __VA_ARGS__)

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp p{};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = device;
  p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return p;
}

CUmulticastObjectProp multicast_properties(int devices, size_t bytes) {
  CUmulticastObjectProp p{};
  p.numDevices = static_cast<unsigned>(devices);
  p.size = bytes;
  p.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return p;
}

int attribute(CUdevice_attribute which, int device) {
  int value = 0;
  check(PYCOLL_DRIVER(cuDeviceGetAttribute)(&value, which, device), "asking what the GPU can do");
  return value;
}

}  // namespace

Physical::~Physical() {
  if (bytes_ > 0) PYCOLL_GIVE_BACK(cuMemRelease, handle_);
}

Physical Physical::create(int device, size_t bytes) {
  const CUmemAllocationProp p = properties(device);
  CUmemGenericAllocationHandle handle = 0;
  check(PYCOLL_DRIVER(cuMemCreate)(&handle, bytes, &p, 0), "taking memory of the GPU");
  return {handle, bytes};
}

Physical Physical::import(int descriptor, size_t bytes) {
  CUmemGenericAllocationHandle handle = 0;
  void* given = reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor));
  check(PYCOLL_DRIVER(cuMemImportFromShareableHandle)(&handle, given, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "importing a peer's memory");
  return {handle, bytes};
}

size_t Physical::granularity(int device) {
  if (attribute(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device) == 0) {
    throw DriverError("pycoll: this GPU's memory cannot be shared between processes");
  }
  const CUmemAllocationProp p = properties(device);
  size_t bytes = 0;
  check(PYCOLL_DRIVER(cuMemGetAllocationGranularity)(&bytes, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "asking for the granularity of memory");
  return bytes;
}

Physical Physical::create_multicast(int devices, size_t bytes) {
  const CUmulticastObjectProp p = multicast_properties(devices, bytes);
  CUmemGenericAllocationHandle handle = 0;
  check(PYCOLL_DRIVER(cuMulticastCreate)(&handle, &p), "joining the GPUs' memory");
  return {handle, bytes};
}

size_t Physical::multicast_granularity(int devices) {
  const CUmulticastObjectProp p = multicast_properties(devices, size_t{2} << 20);
  size_t bytes = 0;
  check(PYCOLL_DRIVER(cuMulticastGetGranularity)(&bytes, &p, CU_MULTICAST_GRANULARITY_MINIMUM),
        "asking for the granularity of multicast");
  return bytes;
}

bool Physical::has_multicast(int device) { return attribute(CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, device) != 0; }

void Physical::add_device(int device) const {
  check(PYCOLL_DRIVER(cuMulticastAddDevice)(handle_, device), "joining the GPU");
}

void Physical::bind(const Physical& memory) const {
  check(PYCOLL_DRIVER(cuMulticastBindMem)(handle_, 0, memory.handle_, 0, bytes_, 0), "joining the GPU's memory");
}

int Physical::share() const {
  int descriptor = -1;
  check(PYCOLL_DRIVER(cuMemExportToShareableHandle)(&descriptor, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        "sharing memory of the GPU");
  return descriptor;
}

Range::Range(int device, size_t bytes) : device_(device), bytes_(bytes) {
  CUdeviceptr base = 0;
  check(PYCOLL_DRIVER(cuMemAddressReserve)(&base, bytes, 0, 0, 0), "reserving addresses");
  base_ = base;
}

Range::~Range() {
  if (bytes_ == 0) return;
  CUdeviceptr at = base_;
  for (const size_t part : parts_) {
    PYCOLL_GIVE_BACK(cuMemUnmap, at, part);
    at += part;
  }
  PYCOLL_GIVE_BACK(cuMemAddressFree, static_cast<CUdeviceptr>(base_), bytes_);
}

void Range::append(const Physical& memory) {
  if (memory.bytes() > bytes_ - mapped()) throw DriverError("pycoll: the range of addresses is full");
  const CUdeviceptr at = base_ + mapped();
  check(PYCOLL_DRIVER(cuMemMap)(at, memory.bytes(), 0, memory.handle_, 0), "mapping memory of a GPU");
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  try {
    check(PYCOLL_DRIVER(cuMemSetAccess)(at, memory.bytes(), &access, 1), "reaching a peer's memory");
  } catch (...) {
    PYCOLL_GIVE_BACK(cuMemUnmap, at, memory.bytes());
    throw;
  }
  parts_.push_back(memory.bytes());
}

}  // namespace pycoll::cuda_device
