#include "cpu/liveness.h"

#include <pthread.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "cpu/error.h"

namespace pycoll::cpu {

namespace {
constexpr size_t kPageBytes = 4096;

pthread_mutex_t* mutex_of(const Mapping& page) { return reinterpret_cast<pthread_mutex_t*>(page.data()); }

struct Current {  // this process's keeper; a forked child starts afresh
  std::mutex lock;
  std::weak_ptr<Keeper> keeper;
  uint64_t generation = 0;
};
Current& current() {
  static auto* c = new Current;  // never destroyed: communicators may outlive static destruction
  static const int registered = pthread_atfork([] { current().lock.lock(); }, [] { current().lock.unlock(); },
                                               [] { current().lock.unlock(); });
  (void)registered;
  return *c;
}
}  // namespace

struct Keeper::State {
  Fd fd;
  Mapping page;
  std::mutex lock;
  std::condition_variable changed;
  bool holding = false, ending = false;
  uint64_t generation = fork_generation();
  std::thread thread;

  void hold() {
    pthread_mutex_lock(mutex_of(page));
    std::unique_lock guard(lock);
    holding = true;
    changed.notify_all();
    changed.wait(guard, [&] { return ending; });
    pthread_mutex_unlock(mutex_of(page));
  }
};

Keeper::Keeper() : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.fd = create_shared_memory("pycoll-liveness", kPageBytes);
  s.page = Mapping(s.fd.get(), kPageBytes);
  pthread_mutexattr_t robust;
  pthread_mutexattr_init(&robust);
  pthread_mutexattr_setpshared(&robust, PTHREAD_PROCESS_SHARED);
  pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(mutex_of(s.page), &robust);
  pthread_mutexattr_destroy(&robust);
  {
    const SignalsBlocked no_signals;
    s.thread = std::thread([&s] { s.hold(); });
  }
  std::unique_lock guard(s.lock);
  s.changed.wait(guard, [&s] { return s.holding; });
}

Keeper::~Keeper() {
  if (state_->generation != fork_generation()) {
    (void)state_.release();  // a forked child: the thread is the parent's
    return;
  }
  {
    const std::lock_guard guard(state_->lock);
    state_->ending = true;
  }
  state_->changed.notify_all();
  state_->thread.join();
}

std::shared_ptr<Keeper> Keeper::get() {
  Current& c = current();
  const std::lock_guard guard(c.lock);
  std::shared_ptr<Keeper> keeper = c.generation == fork_generation() ? c.keeper.lock() : nullptr;
  if (!keeper) {
    keeper.reset(new Keeper);
    c.keeper = keeper;
    c.generation = fork_generation();
  }
  return keeper;
}

int Keeper::page_fd() const { return state_->fd.get(); }

PeerLiveness::PeerLiveness(const Fd& page) : page_(page.get(), kPageBytes) {}

Life PeerLiveness::look() const {
  switch (pthread_mutex_trylock(mutex_of(page_))) {
    case EBUSY:
      return Life::kAlive;
    case 0:
      pthread_mutex_unlock(mutex_of(page_));
      return Life::kLeft;
    case EOWNERDEAD:  // unlocked without being made consistent it is beyond recovery: every other watcher learns it too
      pthread_mutex_unlock(mutex_of(page_));
      return Life::kDead;
    default:
      return Life::kDead;
  }
}

}  // namespace pycoll::cpu
