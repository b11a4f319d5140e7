// Streams and events. See fake.h.
#include "stream.h"

#include <condition_variable>
#include <map>
#include <set>

namespace fake_cuda {

namespace {

using Clock = std::chrono::steady_clock;

std::mutex mutex;                              // of everything below, and of what streams and events hold
auto& changed = *new std::condition_variable;  // never destroyed: the threads of streams outlive main
auto& streams = *new std::set<Stream*>;
auto& defaults = *new std::map<int, Stream*>;  // of the devices
cudaError_t failed = cudaSuccess;              // of an operation that nobody waited for

bool asynchronous() {
  static const bool value = setting("FAKE_CUDA_ASYNC", 0) != 0;
  return value;
}

void serve(std::shared_ptr<Queue> queue, int device) {
  cudaSetDevice(device);
  std::unique_lock lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return !queue->operations.empty() || queue->stop; });
    if (queue->operations.empty()) return;
    const Operation operation = queue->operations.front();  // stays at the front while it runs: the queue is not idle
    lock.unlock();
    const cudaError_t error = operation();
    lock.lock();
    if (error != cudaSuccess) failed = error;
    queue->operations.pop_front();
    changed.notify_all();
  }
}

void enqueue(Stream& stream, Operation operation) {
  if (stream.queue == nullptr) {
    stream.queue = std::make_shared<Queue>();
    std::thread(serve, stream.queue, stream.device).detach();
  }
  stream.queue->operations.push_back(std::move(operation));
  changed.notify_all();
}

Operation set(std::shared_ptr<Mark> mark) {
  return [mark] {
    std::lock_guard lock(mutex);
    mark->done = true;
    mark->at = Clock::now();
    changed.notify_all();
    return cudaSuccess;
  };
}
Operation wait(std::shared_ptr<Mark> mark) {
  return [mark] {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return mark->done; });
    return cudaSuccess;
  };
}

bool idle(const Stream& stream) { return stream.queue == nullptr || stream.queue->operations.empty(); }

// The default stream and those made without cudaStreamNonBlocking wait for one another's earlier operations.
void issue(Stream& stream, Operation operation) {
  const auto order = [](Stream& before, Stream& after) {
    if (idle(before)) return;
    auto mark = std::make_shared<Mark>();
    enqueue(before, set(mark));
    enqueue(after, wait(mark));
  };
  const auto it = defaults.find(stream.device);
  if (it != defaults.end() && it->second == &stream) {
    for (Stream* other : streams) {
      if (other == &stream || other->device != stream.device || (other->flags & cudaStreamNonBlocking) != 0) continue;
      order(*other, stream);
    }
  } else if (it != defaults.end() && (stream.flags & cudaStreamNonBlocking) == 0) {
    order(*it->second, stream);
  }
  enqueue(stream, std::move(operation));
}

// Returns with the lock held. A kernel may wait for a thread that needs the lock of Python's interpreter: as with CUDA,
// who waits here must have let go of it.
cudaError_t wait_until_idle(std::unique_lock<std::mutex>& lock, const Stream& stream) {
  changed.wait(lock, [&] { return idle(stream); });
  return failed;
}

Stream* make_stream(int device, unsigned flags, int priority) {
  auto* stream = new Stream{device, flags, priority, nullptr, nullptr};
  streams.insert(stream);
  return stream;
}

cudaError_t record(Event* event, cudaStream_t handle) {
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  Stream& stream = stream_of(handle);
  std::lock_guard lock(mutex);
  event->capture = stream.capture;
  if (stream.capture != nullptr) return cudaSuccess;
  auto mark = std::make_shared<Mark>();
  event->mark = mark;
  if (asynchronous()) {
    issue(stream, set(mark));
  } else {
    mark->done = true;
    mark->at = Clock::now();
  }
  return cudaSuccess;
}

cudaError_t create(cudaEvent_t* event, unsigned flags) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{current_device(), flags, nullptr, nullptr});
  return cudaSuccess;
}

}  // namespace

std::mutex& stream_mutex() { return mutex; }

Stream& stream_of(cudaStream_t handle) {
  if (handle != nullptr && handle != cudaStreamLegacy && handle != cudaStreamPerThread) {
    return *reinterpret_cast<Stream*>(handle);
  }
  std::lock_guard lock(mutex);
  Stream*& stream = defaults[current_device()];
  if (stream == nullptr) stream = make_stream(current_device(), 0, 0);
  return *stream;
}

cudaError_t submit(cudaStream_t handle, Operation operation) {
  Stream& stream = stream_of(handle);
  {
    std::lock_guard lock(mutex);
    if (stream.capture != nullptr) {
      if (stream.capture->spoilt) return cudaErrorStreamCaptureInvalidated;
      stream.capture->operations.push_back(std::move(operation));
      return cudaSuccess;
    }
    if (asynchronous()) {
      issue(stream, std::move(operation));
      return failed;
    }
  }
  return operation();
}

bool runs_later(cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  std::lock_guard lock(mutex);
  return asynchronous() || stream.capture != nullptr;
}

cudaError_t wait_for(cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  std::unique_lock lock(mutex);
  return wait_until_idle(lock, stream);
}

cudaError_t wait_for_device(int device) {
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] {
    for (const Stream* stream : streams) {
      if (stream->device == device && !idle(*stream)) return false;
    }
    return true;
  });
  return failed;
}

void end_capture(const std::shared_ptr<Capture>& capture) {
  capture->active = false;
  for (Stream* stream : streams) {
    if (stream->capture == capture) stream->capture = nullptr;
  }
}

}  // namespace fake_cuda

using namespace fake_cuda;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  std::lock_guard lock(mutex);
  *stream = reinterpret_cast<cudaStream_t>(make_stream(current_device(), flags, priority));
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  auto* stream = reinterpret_cast<Stream*>(handle);
  std::unique_lock lock(mutex);
  if (streams.count(stream) == 0) return report(cudaErrorInvalidResourceHandle);
  wait_until_idle(lock, *stream);
  if (stream->queue != nullptr) stream->queue->stop = true;
  changed.notify_all();
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream_of(stream).flags;
  return cudaSuccess;
}
cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  *device = stream_of(stream).device;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  FAIL_IN_CAPTURE();
  Stream& stream = stream_of(handle);
  std::lock_guard lock(mutex);
  return report(failed != cudaSuccess ? failed : idle(stream) ? cudaSuccess : cudaErrorNotReady);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  FAIL_IN_CAPTURE();
  return report(wait_for(stream));
}
cudaError_t cudaDeviceSynchronize() {
  FAIL_IN_CAPTURE();
  return report(wait_for_device(current_device()));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  if (event_handle == nullptr) return report(cudaErrorInvalidResourceHandle);
  auto* event = reinterpret_cast<Event*>(event_handle);
  Stream& stream = stream_of(handle);
  std::lock_guard lock(mutex);
  if (event->capture != nullptr) {  // the stream joins the capture: what it does from now on is recorded too
    if (!event->capture->active) return report(cudaErrorCapturedEvent);
    stream.capture = event->capture;
    return cudaSuccess;
  }
  if (stream.capture != nullptr || event->mark == nullptr || event->mark->done) return cudaSuccess;
  enqueue(stream, wait(event->mark));
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return report(submit(stream, [=] {
    function(data);
    return cudaSuccess;
  }));
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return report(submit(stream, [=] {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
  }));
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return create(event, flags); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (event == nullptr) return report(cudaErrorInvalidResourceHandle);
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return report(record(reinterpret_cast<Event*>(event), stream));
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return report(record(reinterpret_cast<Event*>(event), stream));
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  FAIL_IN_CAPTURE();
  auto* event = reinterpret_cast<Event*>(handle);
  std::lock_guard lock(mutex);
  if (event->capture != nullptr) return report(cudaErrorCapturedEvent);
  if (failed != cudaSuccess) return report(failed);
  return report(event->mark == nullptr || event->mark->done ? cudaSuccess : cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  FAIL_IN_CAPTURE();
  auto* event = reinterpret_cast<Event*>(handle);
  std::unique_lock lock(mutex);
  if (event->capture != nullptr) return report(cudaErrorCapturedEvent);
  const std::shared_ptr<Mark> mark = event->mark;
  if (mark != nullptr) changed.wait(lock, [&] { return mark->done; });
  return report(failed);
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  auto* a = reinterpret_cast<Event*>(begin);
  auto* b = reinterpret_cast<Event*>(end);
  std::lock_guard lock(mutex);
  if (a->mark == nullptr || b->mark == nullptr || ((a->flags | b->flags) & cudaEventDisableTiming) != 0) {
    return report(cudaErrorInvalidResourceHandle);
  }
  if (!a->mark->done || !b->mark->done) return report(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(b->mark->at - a->mark->at).count();
  return cudaSuccess;
}

}  // extern "C"
