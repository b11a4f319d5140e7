#include "cpu/collectives.h"

#include <algorithm>

#include "algorithms/call.h"
#include "cpu/mismatch.h"

namespace pycoll::cpu {

namespace {

// Held by rank 0 while it uses what is the other ranks', all of this process; and by who fails before it goes.
std::mutex& meeting_lock() {
  static auto* lock = new std::mutex;
  return *lock;
}

}  // namespace

Collectives::Collectives(const Attachment& attachment, const Heap& heap, const Watch& watch)
    : a_(attachment),
      heap_(heap),
      watch_(watch),
      table_(attachment.table()),
      rank_(attachment.rank),
      world_(attachment.geometry.world),
      spins_(attachment.spins()),
      recorder_(attachment.control(rank_).journals[kCalls]),
      windows_(table_.geometry.channels),
      records_(world_) {
  for (int c = 0; c < table_.geometry.channels; ++c) links_.push_back(std::make_unique<ChannelLinks>(table_, c));
}

void Collectives::execute(const Call& call, bool in_caller) {
  watch_.throw_if_failed();
  const CallRecord mine = record_of(call, sequence_, world_, heap_, a_.one_shot_max_bytes);
  ++sequence_;
  // Alone, or where the CPU moves nothing, one does it all.
  const int channels = world_ == 1 || call.mover || call.meeting || call.work ? 1 : channels_for(mine);
  const uint64_t entry = recorder_.begin(entry_of(call, mine, world_, channels, in_caller));
  std::exception_ptr failure = guarded([&] { collective(call, mine, channels, in_caller); });
  const std::exception_ptr other = lanes_.join([&] {
    const std::exception_ptr interrupted = in_caller ? guarded(check_interrupt) : nullptr;
    if (interrupted && !failure) failure = interrupted;
  });
  if (!failure) failure = other;
  if (failure && call.meeting) {  // the others know of it by now
    const std::lock_guard not_in_use(meeting_lock());
  }
  // A rank that failed may have used its tensors again while this one still read them (F5).
  if (!failure && reaches_into_tensors(mine, records_)) failure = guarded([&] { watch_.throw_if_any_rank_failed(); });
  recorder_.end(entry, failure != nullptr);
  if (failure) std::rethrow_exception(failure);
}

void Collectives::stop() { lanes_.stop(); }

void Collectives::collective(const Call& call, const CallRecord& mine, int channels, bool in_caller) {
  const Operation op{static_cast<const std::byte*>(call.in),
                     static_cast<std::byte*>(call.out),
                     size_of(call.dtype),
                     rank_,
                     world_,
                     {},
                     call.send_counts,
                     call.recv_counts};
  const auto timeout = call.timeout.count() > 0 ? call.timeout : watch_.timeout();
  const auto streamed = too_large_to_cache(call, world_);
  // The entry: on channel 0, with the record; the other channels start when it has passed.
  const auto enter = [&](Window<Executor>& w) {
    table_.barrier_cell(rank_, 0, windows_[0].epoch + 1).record = mine;
    w.barrier();
    compare_records(mine);
    if (channels > 1) lanes_.start(channels, [=, this](int c) { run_lane(c, channels, mine, op, timeout, streamed); });
    return true;
  };
  Executor exec = executor(mine, timeout, in_caller, call.mover, streamed);
  exec.set_work(call.work);
  if (call.meeting) return meet(exec, op, mine, *call.meeting, enter);
  run_channel(exec, op, 0, channels, mine, enter);
}

void Collectives::run_lane(int channel, int channels, const CallRecord& mine, const Operation& op,
                           std::chrono::milliseconds timeout, std::span<const std::byte> streamed) {
  const std::exception_ptr failure = guarded([&] {
    Executor exec = executor(mine, timeout, /*in_caller=*/false, /*mover=*/nullptr, streamed);
    const auto enter = [](Window<Executor>& w) { return w.barrier(); };
    run_channel(exec, op, channel, channels, mine, enter);
  });
  if (failure) std::rethrow_exception(failure);
}

template <class Enter>
void Collectives::run_channel(Executor& exec, const Operation& op, int channel, int channels, const CallRecord& mine,
                              const Enter& enter) {
  dispatch_call(mine.collective, mine.algorithm, [&](auto tag) {
    using A = typename decltype(tag)::type;
    if constexpr (!requires { typename A::OnlyOnGpus; }) {  // see check_call()
      run_call<A>(exec, op, table_, channel, channels, *links_[channel], windows_[channel], records_.data(), mine,
                  enter);
    }
  });
}

// All ranks' tensors are known after the entry; nobody goes on before rank 0 has run the call for all.
template <class Enter>
void Collectives::meet(Executor& exec, Operation op, const CallRecord& mine, Meeting& meeting, const Enter& enter) {
  Window<Executor> w(exec, op, table_, 0, windows_[0], records_.data(), mine);
  enter(w);
  if (rank_ == 0) {
    const std::lock_guard all_stay(meeting_lock());
    watch_.throw_if_any_rank_failed();  // its call and its tensors may be gone
    std::vector<const Call*> calls;
    for (const CallRecord& r : records_) calls.push_back(reinterpret_cast<const Call*>(r.in_offset));
    meeting.run(calls);
  }
  w.barrier();
}

Executor Collectives::executor(const CallRecord& mine, std::chrono::milliseconds timeout, bool in_caller, Mover* mover,
                               std::span<const std::byte> streamed) const {
  return Executor(Waiter(watch_, timeout, spins_, in_caller), mine.dtype, mine.op, world_, mover, streamed);
}

int Collectives::channels_for(const CallRecord& r) const {
  const InOut elements = elements_of(r.collective, r.count, world_);
  const size_t bytes = std::max(elements.in, elements.out) * size_of(r.dtype);
  return static_cast<int>(std::clamp<size_t>(bytes / a_.channel_min_bytes, 1, table_.geometry.channels));
}

void Collectives::compare_records(const CallRecord& mine) {
  for (int r = 0; r < world_; ++r) records_[r] = table_.barrier_cell(r, 0, windows_[0].epoch).record;
  throw_if_different(records_, mine, a_.names);
}

}  // namespace pycoll::cpu
