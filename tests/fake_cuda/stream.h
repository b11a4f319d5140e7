// What streams, events and captures are made of: for stream.cpp and graph.cpp. See fake.h.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fake.h"

namespace fake_cuda {

struct Stream;

// Operations are recorded in the order in which they are issued, over all streams that have joined: one order among
// those that the graph allows.
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Stream* origin;
  std::vector<Operation> operations;
  bool active = true;
  bool spoilt = false;
};

struct Queue {  // with FAKE_CUDA_ASYNC=1
  std::deque<Operation> operations;
  bool stop = false;
};

struct Stream {
  int device;
  unsigned flags;
  int priority;
  std::shared_ptr<Capture> capture;  // null when it does not capture
  std::shared_ptr<Queue> queue;
};

struct Mark {  // one recording of an event
  bool done = false;
  std::chrono::steady_clock::time_point at;
};

struct Event {
  int device;
  unsigned flags;
  std::shared_ptr<Mark> mark;        // of the last recording
  std::shared_ptr<Capture> capture;  // if that was part of a capture
};

std::mutex& stream_mutex();                                 // guards what the structs above hold
Stream& stream_of(cudaStream_t handle);                     // takes the mutex
void end_capture(const std::shared_ptr<Capture>& capture);  // all its streams stop recording; the mutex is held

}  // namespace fake_cuda
