// What a MismatchError says: which ranks made which call.
#pragma once

#include <string>
#include <vector>

#include "core/record.h"
#include "cpu/names.h"

namespace pycoll::cpu {

// [world], not all the same call.
std::string mismatch_text(const std::vector<CallRecord>& records, const Names& names);
// Unless all are the same call as `mine`. Throws Error.
void throw_if_different(const std::vector<CallRecord>& records, const CallRecord& mine, const Names& names);
// An all-to-all in which `from` sends `to` other than that expects.
std::string counts_text(int from, int to, uint64_t sent, uint64_t expected, const Names& names);

}  // namespace pycoll::cpu
