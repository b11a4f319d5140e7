#include "cpu/log.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

namespace pycoll::cpu {

namespace {

constexpr const char* kNames[] = {"debug", "info", "warning", "error"};

// At once, so that the lines of several ranks do not mix; what cannot be said is lost.
void write_line(std::string line) {
  std::replace(line.begin(), line.end(), '\n', ' ');
  line += '\n';
  (void)!::write(STDERR_FILENO, line.data(), line.size());
}

LogLevel level_from_environment() {
  const char* const wanted = std::getenv("PYCOLL_LOG");
  if (wanted == nullptr || *wanted == '\0') return LogLevel::kWarning;
  const auto found = std::find(std::begin(kNames), std::end(kNames), std::string(wanted));
  if (found != std::end(kNames)) return static_cast<LogLevel>(found - std::begin(kNames));
  write_line("pycoll [" + std::to_string(getpid()) + "] warning: PYCOLL_LOG is " + wanted +
             ", and not one of debug, info, warning, error: taken for warning");
  return LogLevel::kWarning;
}

}  // namespace

bool logs(LogLevel level) {
  static const LogLevel least = level_from_environment();
  return level >= least;
}

void write_log(LogLevel level, const Names& names, int rank, int world, const std::string& text) {
  write_line("pycoll [" + names.rank(rank) + " of " + std::to_string(world) + ", " + std::to_string(getpid()) + "] " +
             kNames[static_cast<int>(level)] + ": " + text);
}

}  // namespace pycoll::cpu
