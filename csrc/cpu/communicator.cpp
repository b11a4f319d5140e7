#include "cpu/communicator.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "cpu/call.h"
#include "cpu/collectives.h"
#include "cpu/heap.h"
#include "cpu/mail_office.h"
#include "cpu/queue.h"
#include "cpu/trace.h"

namespace pycoll::cpu {

struct Communicator::Impl {
  const Names names;                       // also when it is closed
  std::shared_ptr<Attachment> attachment;  // none once closed; used in a call of the queue, or under `mapped`
  std::mutex mapped;
  std::shared_ptr<Heap> heap;
  PeerTable table;
  Watch watch;
  Tracer tracer;
  Recorder launches;
  const uint64_t generation = fork_generation();
  std::atomic<bool> closed{false};
  std::mutex closing;
  std::function<void()> last;  // see on_close
  Queue queue;
  Collectives collectives;
  std::shared_ptr<PostOffice> office;
  Mail mail;

  Impl(std::shared_ptr<Attachment> a, std::chrono::milliseconds timeout)
      : names(a->names),
        attachment(std::move(a)),
        heap(std::make_shared<Heap>(attachment->table().heap(attachment->rank), attachment->geometry.heap_bytes)),
        table(attachment->table()),
        watch(*attachment, timeout),
        tracer(*attachment, watch),
        launches(attachment->control(attachment->rank).journals[kLaunches]),
        collectives(*attachment, *heap, watch),
        office(std::make_shared<PostOffice>(*attachment, watch, attachment->spins(), queue)),
        mail(office) {
    watch.on_failure([this](const Error& error) { tracer.tell_failure(error); });
  }

  int rank() const { return table.rank; }
  int world() const { return table.geometry.world; }
  bool forked() const { return generation != fork_generation(); }

  void check_open() const {
    if (forked()) {
      throw Error(ErrorKind::kError,
                  "pycoll: this communicator belongs to the parent process: after fork, create a new one in the child");
    }
    if (closed) throw Error(ErrorKind::kError, "pycoll: the communicator is closed");
  }

  void check(const Call& call) const {
    check_open();
    check_call(call, *heap);
  }

  void take(const Turn& turn, bool in_caller) {
    watch.throw_if_failed();
    const Runner runner(*this, in_caller);
    if (const std::exception_ptr failure = collectives.guarded([&] { turn(runner); })) std::rethrow_exception(failure);
  }

  void close() {
    if (Queue::serves(&queue)) {  // a handler or a callback: end the call; who owns the communicator closes it later
      return give_up("pycoll: " + names.rank(rank()) + " closed the communicator within a collective");
    }
    const std::lock_guard guard(closing);
    if (closed) return;
    std::exception_ptr interrupted;
    const auto interrupt = [&] {
      if (const auto thrown = interruption("while it closed the communicator")) interrupted = thrown;
    };
    queue.stop(interrupt);
    office->close(interrupt);
    collectives.stop();
    if (last) std::exchange(last, nullptr)();
    closed = true;
    tracer.tell_closed();
    store_release(attachment->control(rank()).departed, uint32_t{1});
    {
      const std::lock_guard no_user(mapped);
      attachment = nullptr;
    }
    if (interrupted) std::rethrow_exception(interrupted);
  }

  // What a signal's handler throws ends the communicator.
  std::exception_ptr interruption(const char* doing) {
    try {
      check_interrupt();
      return nullptr;
    } catch (...) {
      give_up("pycoll: " + names.rank(rank()) + " was interrupted " + doing);
      return std::current_exception();
    }
  }
  void give_up(const std::string& why) { fail(Error(ErrorKind::kError, why, rank())); }
  void fail(const Error& error) {
    std::shared_ptr<Attachment> stays;  // not the lock: what is done of a failure may take long
    {
      const std::lock_guard user(mapped);
      stays = attachment;
    }
    if (stays) (void)watch.fail(error);
  }
};

Communicator::Communicator(Store& store, int rank, int world, const Config& config, std::chrono::milliseconds timeout,
                           const Names& names) {
  if (world < 1 || rank < 0 || rank >= world) {
    throw Error(ErrorKind::kUsage,
                "pycoll: rank " + std::to_string(rank) + " is not in a world of " + std::to_string(world));
  }
  if (!names.global_ranks.empty() && names.global_ranks.size() != static_cast<size_t>(world)) {
    throw Error(ErrorKind::kUsage, "pycoll: " + std::to_string(names.global_ranks.size()) +
                                       " global ranks were given for a world of " + std::to_string(world));
  }
  const std::shared_ptr<Attachment> attachment =
      attach(store, rank, world, config, names, Clock::now() + timeout, check_interrupt);
  impl_ = std::make_unique<Impl>(attachment, timeout);
  run({.collective = Collective::kBarrier});  // when all have mapped all, what was in the store has served
  for (const std::string& key : attachment->store_keys) store.erase(key);
}

Communicator::~Communicator() {
  if (!impl_) return;
  if (impl_->forked()) {
    (void)impl_.release();  // threads and locks are the parent's: touch nothing
    return;
  }
  try {
    impl_->close();
    if (Queue::serves(&impl_->queue)) {  // destroyed by a callback: whoever ends the call cannot be waited for here
      const SignalsBlocked no_signals;
      std::thread([impl = impl_.get()] {
        impl->close();
        delete impl;
      }).detach();
      (void)impl_.release();
    }
  } catch (...) {  // an interrupt, which ended the wait for the last calls; or no more threads, and then it stays
    if (!impl_->closed) (void)impl_.release();
  }
}

void Communicator::Runner::operator()(const Call& call) const { impl_.collectives.execute(call, in_caller_); }

void Communicator::check(const Call& call) const { impl_->check(call); }

void Communicator::run(const Call& call) {
  check(call);
  run([&](const Runner& run) { run(call); });
}

void Communicator::run(const Turn& turn) {
  Impl* impl = impl_.get();
  impl->check_open();
  if (Queue::inside(&impl->queue)) {
    throw Error(ErrorKind::kUsage,
                "pycoll: a collective was called from within another, by a signal handler or a callback");
  }
  const auto interrupt = [impl] {
    if (const auto thrown = impl->interruption("in a collective")) std::rethrow_exception(thrown);
  };
  impl->queue.run([&](bool in_caller) { impl->take(turn, in_caller); }, interrupt);
}

void Communicator::enqueue(Turn turn, std::function<void(std::exception_ptr)> done) {
  Impl* impl = impl_.get();
  impl->check_open();
  {
    const std::lock_guard user(impl->mapped);
    if (impl->attachment) impl->watch.throw_if_failed();  // now, rather than when somebody waits
  }
  impl->queue.enqueue([impl, turn = std::move(turn)](bool in_caller) { impl->take(turn, in_caller); }, std::move(done));
}

void Communicator::hand_on() { Queue::hand_on(); }
bool Communicator::inside(const void* turns) { return Queue::inside(turns); }
const void* Communicator::turns() const { return &impl_->queue; }
Mail& Communicator::mail() { return impl_->mail; }

void Communicator::close() {
  if (!impl_->forked()) impl_->close();
}

void Communicator::abort(const std::string& why) {
  if (!impl_->forked()) impl_->give_up(why);
}

Communicator::Monitor Communicator::monitor() const {
  Impl* impl = impl_.get();
  const auto look = [impl] {
    const std::lock_guard user(impl->mapped);
    if (impl->attachment) impl->watch.throw_if_any_rank_is_lost();
  };
  const auto left = [impl] {
    const std::lock_guard user(impl->mapped);
    uint32_t ranks = 0;
    for (int r = 0; impl->attachment && r < std::min(impl->world(), 32); ++r) {
      if (load_acquire(impl->attachment->control(r).departed) != 0) ranks |= uint32_t{1} << r;
    }
    return ranks;
  };
  return {look, left, [impl](const Error& error) { impl->fail(error); }};
}

void Communicator::on_close(std::function<void()> last) { impl_->last = std::move(last); }

std::vector<std::string> Communicator::gather(const std::string& bytes) {
  std::string all(bytes.size() * world(), '\0');
  run({.collective = Collective::kAllGather, .in = bytes.data(), .out = all.data(), .count = bytes.size()});
  std::vector<std::string> parts;
  for (int r = 0; r < world(); ++r) parts.push_back(all.substr(r * bytes.size(), bytes.size()));
  return parts;
}

std::string Communicator::trace() const {
  impl_->check_open();
  const std::lock_guard user(impl_->mapped);
  if (!impl_->attachment) impl_->check_open();  // closed meanwhile
  return impl_->tracer.trace();
}

Recorder& Communicator::launches() const { return impl_->launches; }

const std::vector<std::byte*>& Communicator::segments() const { return impl_->attachment->base; }

uint64_t& Communicator::mapped_device_heap(int rank, int owner) const {
  return impl_->attachment->control(rank).mapped_device_heap[owner];
}

std::shared_ptr<void> Communicator::allocate(size_t bytes) {
  impl_->check_open();
  const std::lock_guard user(impl_->mapped);
  if (!impl_->attachment) impl_->check_open();  // closed meanwhile
  impl_->watch.throw_if_failed();
  std::byte* block = impl_->heap->allocate(bytes);
  return {block, [heap = impl_->heap, keep = impl_->attachment, generation = impl_->generation](void* p) {
            if (generation == fork_generation()) heap->free(static_cast<std::byte*>(p));
          }};
}

int Communicator::rank() const { return impl_->rank(); }
int Communicator::world() const { return impl_->world(); }
const Names& Communicator::names() const { return impl_->names; }
bool Communicator::closed() const { return impl_->closed; }
const Geometry& Communicator::geometry() const { return impl_->table.geometry; }
size_t Communicator::footprint() const {
  return (impl_->closed ? 0 : geometry().scratch_bytes()) + impl_->office->footprint() + impl_->heap->used();
}
std::chrono::milliseconds Communicator::timeout() const { return impl_->watch.timeout(); }
void Communicator::set_timeout(std::chrono::milliseconds timeout) { impl_->watch.set_timeout(timeout); }

}  // namespace pycoll::cpu
