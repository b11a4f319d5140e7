#include "cpu/mismatch.h"

#include <algorithm>
#include <map>

#include "cpu/error.h"

namespace pycoll::cpu {

namespace {

std::string describe(const CallRecord& r) {
  std::string text = name(r.collective);
  if (r.collective == Collective::kBarrier) return text + "()";
  text += std::string("(") + name(r.dtype);
  if (r.collective != Collective::kAllToAll) text += "[" + std::to_string(r.count) + "]";
  if (reduces(r.collective)) text += std::string(", ") + name(r.op);
  if (r.collective == Collective::kAllReduce) text += std::string(", ") + name(r.algorithm);
  if (has_root(r.collective)) text += ", root " + std::to_string(r.root);
  return text + ")";
}

}  // namespace

std::string mismatch_text(const std::vector<CallRecord>& records, const Names& names) {
  // Shapes are told apart only where nothing else differs: a record holds no more than a hash of them.
  const bool shapes = std::all_of(records.begin(), records.end(), [&](CallRecord r) {
    r.shape = records[0].shape;
    return same_call(r, records[0]);
  });
  std::map<uint64_t, int> number;
  std::map<std::string, std::vector<int>> callers;
  for (size_t r = 0; r < records.size(); ++r) {
    std::string text = "call #" + std::to_string(records[r].sequence) + " " + describe(records[r]);
    const int shape = number.emplace(records[r].shape, static_cast<int>(number.size()) + 1).first->second;
    if (shapes) text += ", shape or element type no. " + std::to_string(shape);
    callers[text].push_back(static_cast<int>(r));
  }
  std::string text = "pycoll: ranks make different calls:";
  for (const auto& [call, ranks] : callers) {
    text += (text.back() == ':' ? " rank " : "; rank ") + names.numbers(ranks, ",", 8) + " " + call;
  }
  return text + ". All ranks must make the same calls in the same order";
}

void throw_if_different(const std::vector<CallRecord>& records, const CallRecord& mine, const Names& names) {
  const bool same =
      std::all_of(records.begin(), records.end(), [&](const CallRecord& r) { return same_call(r, mine); });
  if (!same) throw Error(ErrorKind::kMismatch, mismatch_text(records, names));
}

std::string counts_text(int from, int to, uint64_t sent, uint64_t expected, const Names& names) {
  return "pycoll: all_to_all: " + names.rank(from) + " sends " + std::to_string(sent) + " elements to " +
         names.rank(to) + ", which expects " + std::to_string(expected);
}

}  // namespace pycoll::cpu
