// What pycoll says on standard error, a line a message: "pycoll [rank 0 of 2, 4711] info: ...". The environment variable
// PYCOLL_LOG says from which level on: debug, info, warning (as where it is not set) or error. It is read once.
#pragma once

#include <string>

#include "cpu/names.h"

namespace pycoll::cpu {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

bool logs(LogLevel level);  // so that nobody makes a text for nothing
// Whatever the level.
void write_log(LogLevel level, const Names& names, int rank, int world, const std::string& text);

// `text()`, if it is to be said.
template <class Text>
void log(LogLevel level, const Names& names, int rank, int world, const Text& text) {
  if (logs(level)) write_log(level, names, rank, world, text());
}

}  // namespace pycoll::cpu
