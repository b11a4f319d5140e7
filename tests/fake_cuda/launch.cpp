// Kernels: what nvcc's host code registers, and launches. See fake.h.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "fake.h"

namespace fake_cuda {

namespace {

// Most of torch's many thousand kernels are never launched: no more than the name is kept of them.
struct Kernel {
  const char* name;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::mutex mutex;
auto& kernels = *new std::unordered_map<const void*, Kernel>;  // by the address of the host's function
auto& variables = *new std::unordered_map<const void*, std::pair<void*, size_t>>;
thread_local std::vector<Configuration> configurations;

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

const Kernel* find(const void* function) {
  std::lock_guard lock(mutex);
  const auto it = kernels.find(function);
  return it == kernels.end() ? nullptr : &it->second;
}

cudaError_t run(const char* name, dim3 grid, dim3 block, void** args, size_t shared) {
  int result = fake_cuda_run_kernel(name, grid, block, args, shared);
  if (result == kUnknownKernel) result = run_aten_kernel(demangled(name), args);
  if (result == kUnknownKernel) {
    std::fprintf(stderr, "fake_cuda: no such kernel here: %s\n", demangled(name).c_str());
  }
  return static_cast<cudaError_t>(result);
}

// The arguments of a launch that runs later, when those of the caller are gone.
struct Arguments {
  std::vector<std::unique_ptr<std::max_align_t[]>> values;
  std::vector<void*> pointers;
};

std::shared_ptr<Arguments> copy_arguments(const char* name, void** args) {
  auto copy = std::make_shared<Arguments>();
  const bool ours = fake_cuda_argument_bytes(name, 0) != 0;
  const std::string readable = ours ? "" : demangled(name);
  for (int i = 0;; ++i) {
    const size_t bytes = ours ? fake_cuda_argument_bytes(name, i) : aten_argument_bytes(readable, i);
    if (bytes == 0) break;
    copy->values.push_back(std::make_unique<std::max_align_t[]>(bytes / sizeof(std::max_align_t) + 1));
    copy->pointers.push_back(copy->values.back().get());
    std::memcpy(copy->pointers.back(), args[i], bytes);
  }
  if (copy->pointers.empty()) return nullptr;
  return copy;
}

cudaError_t launch(const Kernel* kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const char* name = kernel->name;
  if (grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024 ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (verbose()) {
    std::fprintf(stderr, "fake_cuda: launch %ux%ux%u of %ux%ux%u threads: %s\n", grid.x, grid.y, grid.z, block.x,
                 block.y, block.z, demangled(name).c_str());
  }
  if (!runs_later(stream)) return submit(stream, [=] { return run(name, grid, block, args, shared); });
  const std::shared_ptr<Arguments> copy = copy_arguments(name, args);
  if (copy == nullptr) {
    std::fprintf(stderr, "fake_cuda: no such kernel here, or its arguments are not known: %s\n",
                 demangled(name).c_str());
    return cudaErrorNotSupported;
  }
  return submit(stream, [=] { return run(name, grid, block, copy->pointers.data(), shared); });
}

cudaError_t launch_cooperative(const Kernel* kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  const unsigned resident = static_cast<unsigned>(setting("FAKE_CUDA_MULTIPROCESSORS", 8)) *
                            static_cast<unsigned>(setting("FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR", 1));
  if (grid.x * grid.y * grid.z > resident) return cudaErrorCooperativeLaunchTooLarge;
  return launch(kernel, grid, block, args, shared, stream);
}

}  // namespace

}  // namespace fake_cuda

using namespace fake_cuda;

extern "C" {

// What nvcc puts into the constructors of every object with kernels in it.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  std::lock_guard lock(mutex);
  kernels[host] = {name};
}
void __cudaRegisterVar(void**, char* host, char*, const char*, int, size_t bytes, int, int) {
  std::lock_guard lock(mutex);
  variables[host] = {nullptr, bytes};
}

// What a <<<launch>>> is compiled to.
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return cudaErrorInvalidConfiguration;
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<Kernel*>(find(function)));
  return *kernel != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t stream) {
  return report(launch(reinterpret_cast<const Kernel*>(kernel), grid, block, args, shared, stream));
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                             cudaStream_t stream) {
  return report(launch(find(function), grid, block, args, shared, stream));
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t stream) {
  return report(launch_cooperative(find(function), grid, block, args, shared, stream));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeCooperative || config->attrs[i].val.cooperative == 0) continue;
    return report(launch_cooperative(find(function), config->gridDim, config->blockDim, args, config->dynamicSmemBytes,
                                     config->stream));
  }
  return report(
      launch(find(function), config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream));
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (find(function) == nullptr) return report(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int) {
  return report(find(function) != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int, size_t) {
  *blocks = setting("FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR", 1);
  return report(find(function) != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

// A variable of a kernel's source: one copy for all devices, zero to begin with whatever its initialiser says.
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  std::lock_guard lock(mutex);
  const auto it = variables.find(symbol);
  if (it == variables.end()) return report(cudaErrorInvalidSymbol);
  if (it->second.first == nullptr) {
    it->second.first = std::calloc(1, it->second.second);
    add_range(it->second.first, {Kind::kDevice, 0, it->second.second});
  }
  *address = it->second.first;
  return cudaSuccess;
}

}  // extern "C"
