// Issue order: the calls of a communicator run one at a time, in the order in which they were made, whoever made them.
//
// A synchronous call runs in its caller's thread when nothing is queued or running. Everything else goes through one
// worker thread, which is started with the first such call and ended by stop().
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace pycoll::cpu {

class Queue {
 public:
  using Done = std::function<void(std::exception_ptr failure)>;

  ~Queue() { stop(); }

  // Runs `call` here and now, if nothing comes before it, else queued; returns when it is done and throws what it
  // throws. `interrupt` is called about every 20 ms while another thread runs it. It may throw, having seen to it that
  // the call ends soon: what it threw is thrown on when the call, which uses the caller's memory, has ended.
  template <class F, class Interrupt>
  void run(const F& call, const Interrupt& interrupt) {
    if (!begin()) return run_queued(call, interrupt);
    const struct End {
      Queue& queue;
      ~End() { queue.end(); }
    } end{*this};
    call(/*in_caller=*/true);
  }

  // Queues `call`; `done` is called after it, in the worker thread.
  void enqueue(std::function<void(bool in_caller)> call, Done done);

  void stop();  // runs what is queued, then ends the worker

  // Whether this thread is inside a call: a signal handler that runs in a wait, or a callback of `done`. It must
  // neither run nor stop.
  bool inside() const { return holder_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }

 private:
  struct Job {
    std::function<void(bool)> call;
    Done done;
  };
  bool begin();  // whether the caller may run its call itself; if so it must call end()
  void end();
  void run_queued(std::function<void(bool)> call, const std::function<void()>& interrupt);
  void work();

  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool busy_ = false;  // some thread runs a call:
  std::atomic<std::thread::id> holder_{};
  bool ending_ = false;
  std::thread worker_;
};

}  // namespace pycoll::cpu
