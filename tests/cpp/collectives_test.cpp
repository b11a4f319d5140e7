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
  constexpr Collective kCollectives[] = {Collective::kAllReduce, Collective::kAllReduce, Collective::kAllGather,
                                         Collective::kReduceScatter, Collective::kBroadcast};
  constexpr size_t kCounts[] = {0, 1, 3, 63, 64, 65, 500, 1000, 5000, 26000};  // the last is 100 times a slot
  return {kCollectives[random() % 5],       static_cast<Algorithm>(random() % 4),
          kCounts[random() % 10],           random() % 2 == 0,
          static_cast<unsigned>(random()),  static_cast<int>(random() % world),
          static_cast<int>(random() % 1000)};
}

int64_t value(const Case& c, int rank, size_t i) {
  return (c.seed ^ (rank * 7919)) + static_cast<int64_t>(i) * 3 % 1000;
}

int64_t expected(const Case& c, const Communicator& comm, size_t i) {
  if (c.collective == Collective::kBroadcast) return value(c, c.root, i);
  if (c.collective == Collective::kAllGather) return value(c, static_cast<int>(i / c.count), i % c.count);
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

void run_case(Communicator& comm, const Case& c) {
  const size_t world = comm.world();
  const size_t in_count = c.collective == Collective::kReduceScatter ? c.count * world : c.count;
  const size_t out_count = c.collective == Collective::kAllGather ? c.count * world : c.count;
  std::shared_ptr<int64_t> in = memory(comm, std::max(in_count, out_count), c.mapped >> comm.rank() & 1);
  const bool in_place = c.in_place || c.collective == Collective::kBroadcast;
  const std::shared_ptr<int64_t> other = in_place ? in : memory(comm, out_count, c.mapped >> (comm.rank() + 8) & 1);
  int64_t *from = in.get(), *to = other.get();
  if (in_place && c.collective == Collective::kAllGather) from += comm.rank() * c.count;
  if (in_place && c.collective == Collective::kReduceScatter) to += comm.rank() * c.count;
  for (size_t i = 0; i < in_count; ++i) from[i] = value(c, comm.rank(), i);
  Call call{
      .collective = c.collective, .dtype = DType::kInt64, .root = c.root, .in = from, .out = to, .count = in_count};
  if (c.collective == Collective::kAllReduce) call.algorithm = c.algorithm;
  comm.run(call);
  size_t wrong = 0;
  for (size_t i = 0; i < out_count; ++i) wrong += to[i] != expected(c, comm, i);
  CHECK_EQ(wrong, size_t{0});
}

}  // namespace

int main() {
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
