// Many arrays as one list of blocks, so that torch's threads share one large array and hundreds of small ones alike.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>

#include <algorithm>
#include <vector>

#include "core/layout.h"
#include "cpu/adam.h"

namespace pycoll::bindings {

// f(from, to) for parts of 0 to `count`, on torch's intra-op threads. An iterator's loop is run by torch itself.
// (at::parallel_for would be compiled here, and without the OpenMP library that torch brings along it is a plain loop.)
template <class F>
void on_torch_threads(size_t count, const F& f) {
  constexpr int64_t kGrain = 16;  // for less no thread is woken
  if (count == 0) return;
  at::Tensor places = at::empty({static_cast<int64_t>(count)}, at::kByte);
  const auto* const first = static_cast<const char*>(places.const_data_ptr());
  at::TensorIterator all = at::TensorIterator::nullary_op(places);
  all.for_each(
      [&](char** at, const int64_t*, int64_t size, int64_t) {
        const auto from = static_cast<size_t>(at[0] - first);
        f(from, from + static_cast<size_t>(size));
      },
      kGrain);
}

// What lies between two ends of the blocks of many arrays, one after another.
class BlockList {
 public:
  // size(k): elements of array k.
  template <class Size>
  BlockList(size_t arrays, const Size& size) : ends_(arrays) {
    size_t end = 0;
    for (size_t k = 0; k < arrays; ++k) ends_[k] = end += ceil_div(size(k), cpu::kAdamBlock);
  }
  size_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  // f(k, begin, end) for the elements of array k in the blocks `from` to `to`; the last block may reach past the end.
  template <class F>
  void for_each(size_t from, size_t to, const F& f) const {
    size_t k = std::upper_bound(ends_.begin(), ends_.end(), from) - ends_.begin();
    for (; from < to; ++k) {
      const size_t begin = k == 0 ? 0 : ends_[k - 1], end = std::min(to, ends_[k]);
      if (end > from) f(k, (from - begin) * cpu::kAdamBlock, (end - begin) * cpu::kAdamBlock);
      from = std::max(from, end);
    }
  }

 private:
  std::vector<size_t> ends_;
};

}  // namespace pycoll::bindings
