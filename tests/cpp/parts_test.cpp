// The parts that can be proven alone: how tensors are cut, who neighbours whom, how the heap hands out memory.
#include <cstring>
#include <random>
#include <vector>

#include "algorithms/cut.h"
#include "check.h"
#include "core/topology.h"
#include "cpu/error.h"
#include "cpu/heap.h"
#include "cpu/os.h"

using namespace pycoll;

namespace {

// Every element belongs to exactly one chunk of one round of one channel, and no chunk exceeds its slot.
void chunks_cover_the_tensor_once(const CallRecord& r, const Geometry& g, int channels, size_t chunk_limit) {
  std::vector<int> owners(r.count, 0);
  for (int channel = 0; channel < channels; ++channel) {
    const Partition p = cut(r, g, channel, channels);
    for (size_t round = 0; round < p.rounds(); ++round) {
      const int chunks = p.stride != 0 && r.collective == Collective::kReduceScatter ? g.world : p.chunks;
      for (int c = 0; c < chunks; ++c) {
        const Span s = p.at(round, c);
        CHECK(s.length <= chunk_limit);
        for (size_t i = s.offset; i < s.offset + s.length; ++i) ++owners.at(i);
      }
    }
  }
  for (const int n : owners) CHECK_EQ(n, 1);
}

void partitions() {
  for (const int world : {1, 2, 3, 7, 8}) {
    const Geometry g{world, 4, 2, 64 * 8 * static_cast<size_t>(world), 512, 0};
    for (const size_t count : {0, 1, 5, 64, 127, 128, 1000, 4097}) {
      for (const int channels : {1, 2, 3}) {
        CallRecord r{0, count, 0, 0, 0, Collective::kAllReduce, DType::kBFloat16, ReduceOp::kSum, Algorithm::kRing, 0};
        chunks_cover_the_tensor_once(r, g, channels, g.link_bytes / 4);  // accumulators are fp32
        r.algorithm = Algorithm::kTree;
        chunks_cover_the_tensor_once(r, g, channels, g.link_bytes / 4);
        r.algorithm = Algorithm::kTwoShot;
        chunks_cover_the_tensor_once(r, g, channels, g.place_bytes() / 2);
        r.algorithm = Algorithm::kOneShot;
        chunks_cover_the_tensor_once(r, g, channels, g.slot_bytes / 2);
        r.collective = Collective::kAllGather;
        chunks_cover_the_tensor_once(r, g, channels, g.slot_bytes / 2);
        r.collective = Collective::kReduceScatter;
        r.count = count * world;
        chunks_cover_the_tensor_once(r, g, channels, g.place_bytes() / 2);
      }
    }
  }
}

void trees() {
  for (int world = 1; world <= 33; ++world) {
    for (const bool mirror : {false, true}) {
      int roots = 0, edges = 0;
      for (int r = 0; r < world; ++r) {
        const TreeNeighbours n = tree_neighbours(r, world, mirror);
        roots += n.parent < 0;
        edges += n.child_count;
        for (int i = 0; i < n.child_count; ++i) {
          const TreeNeighbours child = tree_neighbours(n.children[i], world, mirror);
          CHECK_EQ(child.parent, r);
          CHECK_EQ(child.child_index, i);
        }
      }
      CHECK_EQ(roots, 1);
      CHECK_EQ(edges, world - 1);
    }
  }
}

// No inner rank of the tree is an inner rank of its mirror, as long as leaves are the majority.
void mirrors_share_the_load() {
  const int world = 8;
  for (int r = 0; r < world; ++r) {
    const bool inner = tree_neighbours(r, world, false).child_count == 2;
    const bool mirror_inner = tree_neighbours(r, world, true).child_count == 2;
    CHECK(!(inner && mirror_inner));
  }
}

void heap_blocks_never_overlap() {
  constexpr size_t kBytes = size_t{8} << 20;
  const cpu::Fd fd = cpu::create_shared_memory("test", kBytes);
  const cpu::Mapping mapping(fd.get(), kBytes);
  cpu::Heap heap(mapping.data(), kBytes);
  std::mt19937 random(1);
  std::vector<std::pair<std::byte*, size_t>> blocks;
  for (int i = 0; i < 2000; ++i) {
    if (!blocks.empty() && random() % 2 == 0) {
      const size_t which = random() % blocks.size();
      const auto [p, n] = blocks[which];
      for (size_t k = 0; k < n; k += 97) CHECK_EQ(static_cast<int>(p[k]), static_cast<int>(n % 251));
      heap.free(p);
      blocks.erase(blocks.begin() + static_cast<long>(which));
      continue;
    }
    const size_t bytes = random() % 3 == 0 ? random() % 300000 : random() % 3000;
    try {
      std::byte* p = heap.allocate(bytes);
      CHECK_EQ(reinterpret_cast<uintptr_t>(p) % 128, uintptr_t{0});
      CHECK_EQ(heap.offset_of(p, bytes), static_cast<uint64_t>(p - mapping.data()));
      std::memset(p, static_cast<int>(bytes % 251), bytes);
      blocks.emplace_back(p, bytes);
    } catch (const cpu::Error& e) {
      CHECK(blocks.size() > 10);  // full, not broken
    }
  }
  for (const auto& [p, n] : blocks) heap.free(p);
  CHECK_EQ(heap.used(), size_t{0});
  std::byte* all = heap.allocate(kBytes);  // everything has been merged again, and reads as zero
  for (size_t k = 0; k < kBytes; k += 4096) CHECK_EQ(static_cast<int>(all[k]), 0);
  heap.free(all);
  int outside = 0;
  CHECK_EQ(heap.offset_of(&outside, sizeof(outside)), kNotMapped);
}

}  // namespace

int main() {
  partitions();
  trees();
  mirrors_share_the_load();
  heap_blocks_never_overlap();
  return check::report();
}
