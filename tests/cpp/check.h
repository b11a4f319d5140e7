// Checks for the C++ tests: a failed one says where and what, the program goes on, and main ends with `return
// check::report();`.
#pragma once

#include <atomic>
#include <cstdio>
#include <sstream>

namespace check {

inline std::atomic<long> checks{0};
inline std::atomic<long> failures{0};

// Counts a check, from any thread. True where it failed and is to be printed: the first 50 say enough.
inline bool failed(bool ok) {
  checks.fetch_add(1, std::memory_order_relaxed);
  return !ok && failures.fetch_add(1, std::memory_order_relaxed) < 50;
}

// Non-zero where a check failed, or where none was made.
inline int report() {
  std::printf("%ld checks, %ld failed\n", checks.load(), failures.load());
  return failures.load() == 0 && checks.load() > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (check::failed(static_cast<bool>(condition))) {                             \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                              \
  } while (false)

// Both sides are evaluated once and must be printable.
#define CHECK_EQ(actual, expected)                                                                  \
  do {                                                                                              \
    const auto& check_actual = (actual);                                                            \
    const auto& check_expected = (expected);                                                        \
    if (check::failed(check_actual == check_expected)) {                                            \
      std::ostringstream check_text;                                                                \
      check_text << check_actual << " != " << check_expected;                                       \
      std::fprintf(stderr, "%s:%d: failed: %s == %s: %s\n", __FILE__, __LINE__, #actual, #expected, \
                   check_text.str().c_str());                                                       \
    }                                                                                               \
  } while (false)
