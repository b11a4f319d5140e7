// The threads of a rank's channels 1, 2, ...: started when first needed, ended by stop(). Channel 0 is the calling
// thread.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pycoll::cpu {

class Lanes {
 public:
  ~Lanes() { stop(); }

  // Runs job(1) ... job(count - 1), each in its own thread, until join(). One job at a time.
  void start(int count, std::function<void(int channel)> job);
  // Waits for all; what the first that failed threw. `meanwhile` is called about every 20 ms and must not throw.
  std::exception_ptr join(const std::function<void()>& meanwhile);
  void stop();

 private:
  void work(int channel, uint64_t seen);

  std::mutex lock_;
  std::condition_variable changed_;
  std::function<void(int)> job_;
  int count_ = 0;    // channels of the job, the caller's included
  int running_ = 0;  // threads that have not finished it
  uint64_t jobs_ = 0;
  bool ending_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> threads_;
};

}  // namespace pycoll::cpu
