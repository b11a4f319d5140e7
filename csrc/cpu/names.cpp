#include "cpu/names.h"

namespace pycoll::cpu {

std::string Names::number(int r) const {
  std::string text = std::to_string(r);
  const auto i = static_cast<size_t>(r);
  if (i < global_ranks.size() && global_ranks[i] != i) text += " (global rank " + std::to_string(global_ranks[i]) + ")";
  return text;
}

std::string Names::ranks(const std::vector<int>& list) const {
  return (list.size() == 1 ? "rank " : "ranks ") + numbers(list, ", ", 16);
}

std::string Names::numbers(const std::vector<int>& list, const char* separator, size_t most) const {
  std::string text;
  for (size_t i = 0; i < list.size() && i < most; ++i) text += (i ? separator : "") + number(list[i]);
  return list.size() > most ? text + separator + "..." : text;
}

}  // namespace pycoll::cpu
