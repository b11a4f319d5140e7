// Stream capture and graphs: recorded operations, run in the order in which they were issued. See fake.h.
#include <cstdio>

#include "stream.h"

namespace fake_cuda {

namespace {

struct Graph {
  std::shared_ptr<const std::vector<Operation>> operations;
};

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
auto& active = *new std::vector<std::shared_ptr<Capture>>;  // guarded by stream_mutex()
unsigned long long captures = 0;

cudaError_t capture_status(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  const Stream& s = stream_of(stream);
  std::lock_guard lock(stream_mutex());
  *status = s.capture == nullptr ? cudaStreamCaptureStatusNone
            : s.capture->spoilt  ? cudaStreamCaptureStatusInvalidated
                                 : cudaStreamCaptureStatusActive;
  if (id != nullptr) *id = s.capture == nullptr ? 0 : s.capture->id;
  return cudaSuccess;
}

}  // namespace

cudaError_t unsafe_in_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  std::lock_guard lock(stream_mutex());
  for (const auto& capture : active) {
    const bool mine = capture->thread == std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed;
    const bool everyones = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (mine || everyones) {
      capture->spoilt = true;
      return cudaErrorStreamCaptureUnsupported;
    }
  }
  return cudaSuccess;
}

}  // namespace fake_cuda

using namespace fake_cuda;

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream& stream = stream_of(handle);
  std::lock_guard lock(stream_mutex());
  // The default stream cannot be captured.
  if (handle == nullptr || handle == cudaStreamLegacy) return report(cudaErrorStreamCaptureUnsupported);
  if (stream.capture != nullptr) return report(cudaErrorIllegalState);
  stream.capture = std::make_shared<Capture>(Capture{++captures, mode, std::this_thread::get_id(), &stream, {}});
  active.push_back(stream.capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream& stream = stream_of(handle);
  std::lock_guard lock(stream_mutex());
  const std::shared_ptr<Capture> capture = stream.capture;
  *graph = nullptr;
  if (capture == nullptr) return report(cudaErrorIllegalState);
  if (capture->origin != &stream) return report(cudaErrorStreamCaptureUnmatched);
  end_capture(capture);
  std::erase(active, capture);
  if (capture->spoilt) return report(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(
      new Graph{std::make_shared<std::vector<Operation>>(std::move(capture->operations))});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return capture_status(stream, status, nullptr);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  if (graph != nullptr) *graph = nullptr;  // nodes cannot be looked at or added
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return capture_status(stream, status, id);
}

// torch asks how many nodes there are, to warn of an empty graph.
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes != nullptr) return report(cudaErrorNotSupported);
  *count = reinterpret_cast<Graph*>(graph)->operations->size();
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(exec, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return report(submit(stream, [operations = reinterpret_cast<Graph*>(exec)->operations] {
    for (const Operation& operation : *operations) {
      if (const cudaError_t error = operation(); error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }));
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Graph*>(exec);
  return cudaSuccess;
}

}  // extern "C"
