// Seconds a call of small all-reduces, one line a sample, for overhead.py: `overhead RANKS BYTES CALLS SAMPLES`. Ranks are
// threads.
#include <cstdio>
#include <cstdlib>

#include "ranks.h"

int main(int, char** arguments) {
  const int ranks = std::atoi(arguments[1]), calls = std::atoi(arguments[3]), samples = std::atoi(arguments[4]);
  const size_t count = std::strtoull(arguments[2], nullptr, 10) / sizeof(float);
  const auto errors = run_ranks(ranks, {}, Milliseconds(60000), [&](pycoll::cpu::Communicator& comm) {
    std::vector<float> x(count, 0.0f);
    const pycoll::cpu::Call call{.collective = pycoll::Collective::kAllReduce,
                                 .dtype = pycoll::DType::kFloat32,
                                 .in = x.data(),
                                 .out = x.data(),
                                 .count = count};
    for (int sample = -1; sample < samples; ++sample) {  // the first warms up
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < calls; ++i) comm.run(call);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      if (comm.rank() == 0 && sample >= 0) std::printf("%.3e\n", took.count() / calls);
    }
  });
  for (const std::string& e : errors) {
    if (!e.empty()) return std::fprintf(stderr, "%s\n", e.c_str()), 1;
  }
}
