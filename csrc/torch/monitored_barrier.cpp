// Which ranks do not come to a barrier.
#include "torch/errors.h"
#include "torch/mail.h"

namespace pycoll::bindings {

namespace {

using Milliseconds = std::chrono::milliseconds;

// Its messages have tags that no caller uses: one for each barrier, so that what a late rank sends to one is not taken
// for another's.
constexpr int kFirstTag = 0x7ff00000, kTags = 0x80000;
int tag_of(uint64_t count) { return kFirstTag + static_cast<int>(count % kTags); }

constexpr uint64_t kKind = 0x6d6f6e69746f72;

// An empty message. Asynchronous, as it may be left behind.
cpu::Request send(cpu::Mail& mail, int peer, int tag) {
  return mail.send({.kind = kKind, .peer = peer, .tag = tag}, [](const std::exception_ptr&) {});
}
cpu::Request receive(cpu::Mail& mail, int peer, int tag) {
  return mail.receive({.kind = kKind, .peer = peer, .tag = tag}, [](const std::exception_ptr&) {});
}

class Deadline {
 public:
  explicit Deadline(Milliseconds timeout) : end_(cpu::Clock::now() + timeout) {}
  Milliseconds left() const { return std::chrono::duration_cast<Milliseconds>(end_ - cpu::Clock::now()); }

 private:
  const cpu::Clock::time_point end_;
};

[[noreturn]] void fail(const std::string& text, int culprit) { throw Error(ErrorKind::kTimeout, text, culprit); }

// Whether it has come in time. Other errors than that go on.
bool comes(const cpu::Request& request, Milliseconds patience) {
  if (request.ended()) return request.wait(), true;
  if (patience.count() <= 0) return false;
  try {
    request.wait(patience);
    return true;
  } catch (const Error& e) {
    if (e.kind != ErrorKind::kTimeout) throw;
    return false;
  }
}

void await_all(cpu::Communicator& comm, Milliseconds timeout, bool wait_for_all, int tag) {
  const Deadline deadline(timeout);
  std::vector<cpu::Request> arrivals(comm.world());
  for (int r = 1; r < comm.world(); ++r) arrivals[r] = receive(comm.mail(), r, tag);
  std::vector<int> here, missing;
  const cpu::Names& names = comm.names();
  const std::string me = names.number(0);
  const std::string in_time = " in " + std::to_string(timeout.count()) + " ms";
  for (int r = 1; r < comm.world(); ++r) {
    if (deadline.left().count() <= 0 && missing.empty() && !arrivals[r].ended()) {
      fail("[Rank " + me + "]: Rank " + me + " timed out in monitoredBarrier after " + std::to_string(timeout.count()) +
               " ms.\n" +
               (here.empty() ? "No ranks successfully processed in monitoredBarrier."
                             : "Successfully processed ranks: " + names.numbers(here)),
           r);
    }
    if (comes(arrivals[r], deadline.left())) {
      here.push_back(r);
      continue;
    }
    if (!wait_for_all) {
      fail("[Rank " + me + "]: Rank " + names.number(r) + " failed to pass monitoredBarrier" + in_time, r);
    }
    missing.push_back(r);
  }
  if (!missing.empty()) {
    fail("[Rank " + me + "]: Ranks " + names.numbers(missing) + " failed to pass monitoredBarrier" + in_time,
         missing.front());
  }
  for (int r = 1; r < comm.world(); ++r) send(comm.mail(), r, tag).wait();
}

}  // namespace

void monitored_barrier(cpu::Communicator& comm, Milliseconds timeout, bool wait_for_all, uint64_t count) {
  const int tag = tag_of(count);
  if (comm.rank() == 0) return await_all(comm, timeout, wait_for_all, tag);
  const Deadline deadline(timeout);
  const cpu::Request answer = receive(comm.mail(), 0, tag);
  const cpu::Request arrival = send(comm.mail(), 0, tag);
  const std::string me = comm.names().number(comm.rank()), first = comm.names().rank(0);
  std::string why = "it did not answer in " + std::to_string(timeout.count()) + " ms";
  try {
    if (comes(arrival, deadline.left()) && comes(answer, deadline.left())) return;
  } catch (const Error& e) {
    why = e.what();
  }
  fail("[Rank " + me + "]: Rank " + me +
           " successfully reached monitoredBarrier, but received errors while waiting for send/recv from " + first +
           ". Please check " + first + " logs for faulty rank. (" + why + ")",
       0);
}

}  // namespace pycoll::bindings
