// First-fit allocation of offsets: knows no memory, only which parts of a range are taken.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

namespace pycoll::cpu {

class FirstFit {
 public:
  explicit FirstFit(size_t bytes = 0) { extend(bytes); }

  void extend(size_t bytes);  // the range grows at its end
  std::optional<size_t> take(size_t bytes, size_t alignment);

  struct Part {
    size_t begin, end;
  };
  struct Freed {
    Part block;  // what was taken
    Part free;   // with its free neighbours
  };
  Freed give_back(size_t offset);

  size_t size() const { return size_; }
  size_t used() const { return used_bytes_; }

 private:
  Part merge(Part part);  // into free_

  size_t size_ = 0, used_bytes_ = 0;
  std::map<size_t, size_t> free_;  // offset -> bytes, neighbours always merged
  std::map<size_t, size_t> used_;
};

}  // namespace pycoll::cpu
