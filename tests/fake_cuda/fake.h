// CUDA on host memory, a test double: what the files of libfake_cuda.so share.
//
// It proves host logic only: which calls are made, in which order, with which handles, sizes, devices and streams. It
// proves nothing of GPU memory ordering, of what is visible to whom when, nor of speed: "device memory" is host memory,
// and the "kernels" are host functions (kernels.cpp, aten.cpp).
//
// Operations run in the calling thread when they are issued: a stream is always idle, an event always complete. With
// FAKE_CUDA_ASYNC=1 each stream has a thread of its own, so that kernels may wait for one another, and a missing wait
// between streams can show. A graph is always one sequence, in the order of the capture.
//
// Settings, environment variables all: FAKE_CUDA_DEVICES (1; CUDA_VISIBLE_DEVICES is heeded), FAKE_CUDA_MEMORY_MIB a
// device (16384), FAKE_CUDA_MULTIPROCESSORS (8), FAKE_CUDA_BLOCKS_PER_MULTIPROCESSOR (1), FAKE_CUDA_ASYNC, and
// FAKE_CUDA_VERBOSE=1, which tells of launches and of functions that are not here.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>

// What kernels.cpp supplies. `args` are pointers to the kernel's arguments, as cudaLaunchKernel takes them.
extern "C" {
// 0 = it ran; kUnknownKernel = no such kernel here; any other value is reported as the error of the launch.
int fake_cuda_run_kernel(const char* mangled_name, dim3 grid, dim3 block, void** args, size_t shared_bytes);
// The size of argument `index`, 0 when there are no more: a launch that runs later has to copy them, and does not say
// how large they are.
size_t fake_cuda_argument_bytes(const char* mangled_name, int index);
}

namespace fake_cuda {

constexpr int kUnknownKernel = cudaErrorNotSupported;
constexpr size_t kGranularity = size_t{2} << 20;  // of the driver's virtual memory management

// device.cpp
int device_count();
int current_device();
int physical_device(int device);               // CUDA_VISIBLE_DEVICES renumbers devices for a process
int visible_device(int physical);              // -1: this process does not see it
int setting(const char* name, int otherwise);  // an environment variable that is a number
bool verbose();
// Every runtime function returns through this: it is what cudaGetLastError reports.
cudaError_t report(cudaError_t error);
cudaError_t attribute(int* value, int attribute, int device);

// memory.cpp
enum class Kind { kDevice, kHost, kRegistered };
struct Range {
  Kind kind;
  int device;
  size_t bytes;
};
void add_range(const void* begin, Range range);
void remove_range(const void* begin);
// The known range that holds [p, p + bytes). Copied, since other threads may remove it meanwhile.
bool find_range(const void* p, size_t bytes, Range* found, const void** begin = nullptr);
bool reserve_memory(int device, size_t bytes);  // false: the device is full
void release_memory(int device, size_t bytes);

// stream.cpp
using Operation = std::function<cudaError_t()>;
// Runs, queues or (where the stream captures) records the operation.
cudaError_t submit(cudaStream_t stream, Operation operation);
// Whether the arguments of an operation on this stream must outlive the call that issues it.
bool runs_later(cudaStream_t stream);
cudaError_t wait_for(cudaStream_t stream);
cudaError_t wait_for_device(int device);
// What may not be called during a capture (unless the thread has said cudaStreamCaptureModeRelaxed) asks here first: as
// with CUDA it then fails and spoils the capture.
cudaError_t unsafe_in_capture();

// aten.cpp: the few kernels of torch without which no tensor can be filled or cast. As in kernels.cpp.
int run_aten_kernel(const std::string& demangled, void** args);
size_t aten_argument_bytes(const std::string& demangled, int index);

}  // namespace fake_cuda

#define FAIL_IN_CAPTURE() \
  if (const cudaError_t unsafe = fake_cuda::unsafe_in_capture(); unsafe != cudaSuccess) return fake_cuda::report(unsafe)
