// Random sequences of collectives over ranks that are threads: every algorithm, staged, symmetric and mixed, in and out
// of place, on one and on several channels, checked element by element.
#include <random>

#include "check.h"
#include "ranks.h"

using namespace pycoll;
using cpu::Call;
using cpu::Communicator;

namespace {

struct Case {
  Collective collective;
  Algorithm algorithm;
  size_t count;  // of one rank's block (all-gather, reduce-scatter) or of the tensor
  bool in_place;
  unsigned mapped;  // bit r: the input of rank r lies in its heap; bit r + 8: the output
  int root;
  int seed;
};

Case random_case(std::mt19937& random, int world) {
  constexpr Collective kCollectives[] = {Collective::kAllReduce, Collective::kReduce,        Collective::kBroadcast,
                                         Collective::kAllGather, Collective::kGather,        Collective::kScatter,
                                         Collective::kAllToAll,  Collective::kReduceScatter, Collective::kAllReduce};
  constexpr size_t kCounts[] = {0, 1, 3, 63, 64, 65, 500, 1000, 5000, 26000};  // the last is 100 times a slot
  return {kCollectives[random() % 9],       static_cast<Algorithm>(random() % 4),
          kCounts[random() % 10],           random() % 2 == 0,
          static_cast<unsigned>(random()),  static_cast<int>(random() % world),
          static_cast<int>(random() % 1000)};
}

int64_t value(const Case& c, int rank, size_t i) {
  return (c.seed ^ (rank * 7919)) + static_cast<int64_t>(i) * 3 % 1000;
}

// What `from` sends `to` in an all-to-all.
uint64_t count_between(const Case& c, int from, int to) { return (c.count * (from + 1) / (to + 2) + c.seed) % 7001; }

int64_t expected(const Case& c, const Communicator& comm, size_t i) {
  if (c.collective == Collective::kBroadcast) return value(c, c.root, i);
  if (c.collective == Collective::kScatter) return value(c, c.root, i + comm.rank() * c.count);
  if (c.collective == Collective::kAllGather || c.collective == Collective::kGather) {
    return value(c, static_cast<int>(i / c.count), i % c.count);
  }
  if (c.collective == Collective::kReduceScatter) i += comm.rank() * c.count;
  int64_t sum = 0;
  for (int r = 0; r < comm.world(); ++r) sum += value(c, r, i);
  return sum;
}

// Memory for `count` elements, in the heap or not.
std::shared_ptr<int64_t> memory(Communicator& comm, size_t count, bool mapped) {
  if (!mapped) return std::shared_ptr<int64_t>(new int64_t[count + 1], std::default_delete<int64_t[]>());
  return std::static_pointer_cast<int64_t>(comm.allocate(count * sizeof(int64_t)));
}

void run_all_to_all(Communicator& comm, const Case& c) {
  const int world = comm.world(), rank = comm.rank();
  std::vector<uint64_t> send, recv;
  uint64_t sent = 0, received = 0;
  for (int r = 0; r < world; ++r) {
    sent += send.emplace_back(count_between(c, rank, r));
    received += recv.emplace_back(count_between(c, r, rank));
  }
  const auto in = memory(comm, sent, c.mapped >> rank & 1), out = memory(comm, received, c.mapped >> (rank + 8) & 1);
  for (size_t i = 0; i < sent; ++i) in.get()[i] = value(c, rank, i);
  comm.run({.collective = Collective::kAllToAll,
            .dtype = DType::kInt64,
            .in = in.get(),
            .out = out.get(),
            .send_counts = send.data(),
            .recv_counts = recv.data()});
  size_t wrong = 0, at = 0;
  for (int r = 0; r < world; ++r) {
    uint64_t before = 0;
    for (int to = 0; to < rank; ++to) before += count_between(c, r, to);
    for (uint64_t i = 0; i < recv[r]; ++i) wrong += out.get()[at++] != value(c, r, before + i);
  }
  CHECK_EQ(wrong, size_t{0});
}

void run_case(Communicator& comm, const Case& c) {
  if (c.collective == Collective::kAllToAll) return run_all_to_all(comm, c);
  const bool is_root = comm.rank() == c.root;
  const bool reads = c.collective != Collective::kScatter || is_root;
  const bool writes = (c.collective != Collective::kGather && c.collective != Collective::kReduce) || is_root;
  const size_t world = comm.world();
  const bool scatters = c.collective == Collective::kReduceScatter || c.collective == Collective::kScatter;
  const bool gathers = c.collective == Collective::kAllGather || c.collective == Collective::kGather;
  const size_t in_count = scatters ? c.count * world : c.count;
  const size_t out_count = gathers ? c.count * world : c.count;
  std::shared_ptr<int64_t> in = memory(comm, std::max(in_count, out_count), c.mapped >> comm.rank() & 1);
  const bool in_place = (c.in_place && reads && writes) || c.collective == Collective::kBroadcast;
  const std::shared_ptr<int64_t> other = in_place ? in : memory(comm, out_count, c.mapped >> (comm.rank() + 8) & 1);
  int64_t *from = in.get(), *to = other.get();
  if (in_place && gathers) from += comm.rank() * c.count;
  if (in_place && scatters) to += comm.rank() * c.count;
  for (size_t i = 0; i < in_count; ++i) from[i] = value(c, comm.rank(), i);
  Call call{.collective = c.collective,
            .dtype = DType::kInt64,
            .root = has_root(c.collective) ? c.root : 0,
            .count = in_count};
  if (reads) call.in = from;
  if (writes) call.out = to;
  if (c.collective == Collective::kAllReduce) call.algorithm = c.algorithm;
  comm.run(call);
  size_t wrong = 0;
  for (size_t i = 0; writes && i < out_count; ++i) wrong += to[i] != expected(c, comm, i);
  CHECK_EQ(wrong, size_t{0});
}

// Counts that do not fit: all ranks are told the same.
void test_counts_differ(int world) {
  std::vector<cpu::ErrorKind> kinds;
  const auto errors = run_ranks(
      world, small_config(), Milliseconds(60000),
      [&](Communicator& comm) {
        std::vector<uint64_t> send(world, 3), recv(world, 3);
        if (comm.rank() == world - 1) recv[0] = 2;
        std::vector<int32_t> in(3 * world), out(3 * world);
        comm.run({.collective = Collective::kAllToAll,
                  .dtype = DType::kInt32,
                  .in = in.data(),
                  .out = out.data(),
                  .send_counts = send.data(),
                  .recv_counts = recv.data()});
      },
      &kinds);
  for (int r = 0; r < world; ++r) {
    CHECK(kinds[r] == cpu::ErrorKind::kMismatch);
    CHECK(errors[r].find("rank 0 sends 3 elements to rank " + std::to_string(world - 1) + ", which expects 2") !=
          std::string::npos);
  }
}

}  // namespace

int main() {
  for (const int world : {2, 3}) test_counts_differ(world);
  for (const int channels : {1, 3}) {
    for (const int world : {1, 2, 3, 4, 7}) {
      const auto errors = run_ranks(world, small_config(channels), Milliseconds(60000), [&](Communicator& comm) {
        std::mt19937 random(42 + world);  // the same on all ranks
        for (int i = 0; i < 150; ++i) run_case(comm, random_case(random, world));
      });
      for (const std::string& e : errors) CHECK_EQ(e, std::string());
    }
  }
  return check::report();
}
