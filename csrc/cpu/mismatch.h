// What a MismatchError says: which ranks made which call.
#pragma once

#include <string>
#include <vector>

#include "core/record.h"

namespace pycoll::cpu {

std::string mismatch_text(const std::vector<CallRecord>& records);  // [world], not all the same call

}  // namespace pycoll::cpu
