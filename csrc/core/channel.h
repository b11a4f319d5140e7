// Channel: first-in-first-out verbs between neighbours. Ring and tree are written in them.
//
// A verb takes one message from each connection of `Links::recv`, gives one to each of `Links::send`, and may reduce
// with the own chunk of the input and copy to the output. All verbs are one `op`: the leader waits, everybody moves
// data, the leader posts. Invariants L1 to L5 of csrc/README.md are kept here.
//
// The executor `Exec` is the device: a CPU thread, a CUDA block, or host threads that stand in for one.
//   bool leader()                              whether this thread waits and posts for its group
//   bool await(const Cell&, uint64_t, int peer)     leader only: until the cell holds at least that value; false (or
//                                                   an exception) on failure
//   bool await_barrier(const PeerTable&, int channel, uint64_t epoch)   the same for the barrier cells of all others
//   void post(Cell&, uint64_t)                 leader only
//   bool sync(bool ok)                         all threads of the group meet; whether all said true
//   void combine(const CombineArgs&), void copy(void*, const void*, size_t)   all threads, each its part
//   const void** sources(), void** destinations(), uint64_t* units()   room for a pointer or 8 bytes of each rank, for
//                                              this thread
//   void report_counts(int from, int to, uint64_t sent, uint64_t expected)   an all-to-all in which these differ: fails
// On the CPU besides:
//   void work(const void* const* in, void* const* out)   what the call does to this rank's shard, see algorithms/shards.h
// Where the device has words and multimem, besides:
//   bool await_until(predicate, int peer)      any thread, for itself: until the predicate holds; false on failure
//   uint64_t reduce(const uint64_t* units, int count)   8 bytes of elements of each rank into 8 bytes of the result
//   void fence()                               what this thread wrote or read comes before what it writes or reads next
//   void reduce_in_switch(const PeerTable&, size_t offset, size_t count)   all threads; see Window
//   void report_mismatch(const PeerTable&, int channel, uint64_t epoch)   leader only, and also after a failed sync:
//                                              once all have posted the barrier, tells the host what each rank calls
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cell.h"
#include "core/combine.h"
#include "core/partition.h"

namespace pycoll {

struct Connection {
  Cell* head;          // posted by the sender: messages written
  Cell* credit;        // posted by the receiver: messages taken
  std::byte* buffers;  // link_slots buffers of link_bytes, in the receiver's segment
  uint64_t* count;     // messages so far, as this end knows; private to this rank
  int peer;            // who is at the other end
};

struct Links {
  const Connection* recv;
  int recv_count;
  const Connection* send;
  int send_count;
};

// This rank's tensors and what is done to them; the same for Channel and Window.
struct Operation {
  const std::byte* in;
  std::byte* out;
  size_t element_bytes;
  int rank, world;
  Partition partition;
  // All-to-all only, [world]: how many elements go to each rank, and how many are expected of it.
  const uint64_t* send_counts = nullptr;
  const uint64_t* recv_counts = nullptr;
};

template <class Exec>
class Channel {
 public:
  PYCOLL_HD Channel(Exec& exec, const Operation& op, int link_slots, size_t link_bytes)
      : exec_(exec), op_(op), link_slots_(link_slots), link_bytes_(link_bytes) {}

  PYCOLL_HD void begin(size_t round) { round_ = round; }
  PYCOLL_HD int rank() const { return op_.rank; }
  PYCOLL_HD int world() const { return op_.world; }
  PYCOLL_HD int link_slots() const { return link_slots_; }
  PYCOLL_HD size_t rounds() const { return op_.partition.rounds(); }

  // The reduce half carries accumulators (fp32 for 16-bit types); the rank that completes a chunk rounds it once.
  PYCOLL_HD void send(const Links& l, int chunk) { op<false, true, false, true>(l, chunk); }
  PYCOLL_HD void recv_reduce_send(const Links& l, int chunk) { op<true, true, false, true>(l, chunk); }
  PYCOLL_HD void recv_reduce_copy_send(const Links& l, int chunk) { op<true, true, true, true>(l, chunk); }
  // The gather half carries finished elements.
  PYCOLL_HD void recv_copy_send(const Links& l, int chunk) { op<true, false, true, true>(l, chunk); }
  PYCOLL_HD void recv_copy(const Links& l, int chunk) { op<true, false, true, false>(l, chunk); }

 private:
  template <bool kRecv, bool kReduce, bool kCopy, bool kSend>
  PYCOLL_HD void op(const Links& l, int chunk) {
    if (!exec_.sync(!exec_.leader() || ready<kRecv, kSend>(l))) return;
    move<kRecv, kReduce, kCopy, kSend>(l, op_.partition.at(round_, chunk));
    exec_.sync(true);
    if (exec_.leader()) done<kRecv, kSend>(l);
  }

  template <bool kRecv, bool kSend>
  PYCOLL_HD bool ready(const Links& l) {
    for (int i = 0; kRecv && i < l.recv_count; ++i) {
      if (!exec_.await(*l.recv[i].head, *l.recv[i].count + 1, l.recv[i].peer)) return false;
    }
    for (int i = 0; kSend && i < l.send_count; ++i) {
      const uint64_t message = *l.send[i].count + 1;
      if (message > static_cast<uint64_t>(link_slots_) &&
          !exec_.await(*l.send[i].credit, message - link_slots_, l.send[i].peer)) {
        return false;
      }
    }
    return true;
  }

  template <bool kRecv, bool kReduce, bool kCopy, bool kSend>
  PYCOLL_HD void move(const Links& l, Span span) {
    const void** src = exec_.sources();
    void** dst = exec_.destinations();
    int srcs = 0, dsts = 0;
    for (int i = 0; kRecv && i < l.recv_count; ++i) src[srcs++] = buffer(l.recv[i]);
    const uint32_t received = (uint32_t{1} << srcs) - 1;
    if (kReduce) src[srcs++] = op_.in + span.offset * op_.element_bytes;
    if (kCopy) dst[dsts++] = op_.out + span.offset * op_.element_bytes;
    for (int i = 0; kSend && i < l.send_count; ++i) dst[dsts++] = buffer(l.send[i]);
    if (kReduce) {
      exec_.combine({dst, dsts, src, srcs, received, kCopy, op_.world, span.length});
    } else {
      for (int i = 0; i < dsts; ++i) exec_.copy(dst[i], src[0], span.length * op_.element_bytes);
    }
  }

  template <bool kRecv, bool kSend>
  PYCOLL_HD void done(const Links& l) {
    for (int i = 0; kRecv && i < l.recv_count; ++i) exec_.post(*l.recv[i].credit, ++*l.recv[i].count);
    for (int i = 0; kSend && i < l.send_count; ++i) exec_.post(*l.send[i].head, ++*l.send[i].count);
  }

  PYCOLL_HD std::byte* buffer(const Connection& c) const {
    return c.buffers + (*c.count + 1) % static_cast<uint64_t>(link_slots_) * link_bytes_;
  }

  Exec& exec_;
  const Operation& op_;
  const int link_slots_;
  const size_t link_bytes_;
  size_t round_ = 0;
};

}  // namespace pycoll
