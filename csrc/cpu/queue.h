// Issue order: the calls of a communicator run one at a time, in the order in which they were made, whoever made them.
//
// A synchronous call runs in its caller's thread when nothing is queued or running. Everything else goes through a worker
// thread, which is started with the first such call and ended by stop(). While what comes after a call takes its time, or
// waits for later ones itself, another worker goes on: see hand_on().
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pycoll::cpu {

class Queue {
 public:
  using Done = std::function<void(std::exception_ptr failure)>;

  ~Queue() {
    stop([] {});
  }

  // Runs `call` here and now, if nothing comes before it, else queued; returns when it is done and throws what it
  // throws. `interrupt` is called about every 20 ms while another thread runs it. It may throw, having seen to it that
  // the call ends soon: what it threw is thrown on when the call, which uses the caller's memory, has ended.
  template <class F, class Interrupt>
  void run(const F& call, const Interrupt& interrupt) {
    if (!begin()) return run_queued(call, interrupt);
    const struct Turn {
      Queue& queue;
      Inside inside{&queue};
      ~Turn() { queue.end(); }
    } turn{*this};
    call(/*in_caller=*/true);
  }

  // Queues `call`; `done` is called after it, in a worker thread.
  void enqueue(std::function<void(bool in_caller)> call, Done done);

  // By `done`, whatever the queue, before it runs what it does not know: the call is over, and the next may begin. From
  // here on this thread may make calls and wait for them, but not stop the queue. Does nothing elsewhere.
  static void hand_on();

  // Runs what is queued, also by a `done`, then ends the workers. `interrupt` is called about every 20 ms; it must not throw.
  void stop(const std::function<void()>& interrupt);

  // Whether a call of this thread would be refused: stop() has begun, and this is none of its workers.
  bool refuses() const { return ending_ && !is_worker(); }

  // Whether this thread is inside a call of `queue` (compared, not looked into): a signal handler that runs in a wait,
  // or `done` before hand_on(). It must neither run, nor stop, nor wait for a later call.
  static bool inside(const void* queue);
  // Whether it is inside one, or is one of the workers, which end with the queue.
  static bool serves(const Queue* queue);

  struct Inside {  // while it lives, this thread is inside a call, or something as good as one; innermost first
    explicit Inside(const void* q);
    ~Inside();
    Inside(const Inside&) = delete;
    const void* queue;
    const Inside* outer;
  };

 private:
  struct Job {
    std::function<void(bool)> call;
    Done done;
  };
  bool begin();  // whether the caller may run its call itself; if so it must call end()
  void end();
  void run_queued(std::function<void(bool)> call, const std::function<void()>& interrupt);
  void need_worker();      // one that is not away; with the lock
  bool is_worker() const;  // this thread
  void work();
  struct Worker;

  std::mutex lock_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool busy_ = false;                   // some thread runs a call
  std::atomic<bool> ending_{false};     // set under the lock
  size_t running_ = 0, away_ = 0;       // workers: not ended; in a `done` that has handed on
  std::vector<std::thread> workers_;    // all that have not been joined
  std::vector<std::thread::id> spare_;  // of them: those that have ended before the queue
};

}  // namespace pycoll::cpu
