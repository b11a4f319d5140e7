// How many blocks of a GPU the communicators of this process may hold at once.
#pragma once

namespace pycoll::bindings {

// Blocks of a GPU that collectives of this process may hold at once, so that all of them fit on it together
// (csrc/README.md, D3).
class ReservedBlocks {
 public:
  ReservedBlocks(int device, int wish);  // gets less when others hold much; at least 1, or throws Error
  ~ReservedBlocks();
  ReservedBlocks(const ReservedBlocks&) = delete;
  int count() const { return count_; }
  void keep(int count);  // gives the rest back

 private:
  const int device_;
  int count_ = 0;
};

}  // namespace pycoll::bindings
