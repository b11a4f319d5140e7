#include "cpu/liveness.h"

#include <pthread.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "core/atomic.h"
#include "cpu/error.h"

namespace pycoll::cpu {

namespace {
constexpr size_t kPageBytes = 4096;

// What a process shows of itself.
struct Page {
  pthread_mutex_t held;  // by the keeper
  uint32_t dead;         // 1: a watcher has found it so
  uint32_t left;         // 1: the keeper ended in order
};
static_assert(sizeof(Page) <= kPageBytes);

Page& page_of(const Mapping& page) { return *reinterpret_cast<Page*>(page.data()); }

struct Current {  // this process's keeper; a forked child starts afresh
  std::mutex lock;
  std::weak_ptr<Keeper> keeper;
  uint64_t generation = 0;
};
Current& current() {
  static auto* c = new Current;  // never destroyed: communicators may outlive static destruction
  static const int registered =
      pthread_atfork([] { current().lock.lock(); }, [] { current().lock.unlock(); }, [] { current().lock.unlock(); });
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
    pthread_mutex_lock(&page_of(page).held);
    std::unique_lock guard(lock);
    holding = true;
    changed.notify_all();
    changed.wait(guard, [&] { return ending; });
    store_release(page_of(page).left, uint32_t{1});
    pthread_mutex_unlock(&page_of(page).held);
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
  pthread_mutex_init(&page_of(s.page).held, &robust);
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
  Page& page = page_of(page_);
  if (load_acquire(page.dead) != 0) return Life::kDead;
  if (load_acquire(page.left) != 0) return Life::kLeft;
  const int locked = pthread_mutex_trylock(&page.held);
  if (locked == EBUSY) return Life::kAlive;
  // Only the first watchers are told: after this unlock, which does not make the mutex consistent, it reads as busy for
  // ever. So write it down first; should this watcher be killed before, the kernel tells the next one again.
  const Life life = load_acquire(page.left) != 0 ? Life::kLeft : Life::kDead;
  if (life == Life::kDead) store_release(page.dead, uint32_t{1});
  if (locked == 0 || locked == EOWNERDEAD) pthread_mutex_unlock(&page.held);
  return life;
}

}  // namespace pycoll::cpu
