// What ranks must agree on before they share GPUs' memory: a step counts only if it succeeded on all of them.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "cpu/communicator.h"

namespace pycoll::bindings {

// Every rank's value of a plain type. A collective.
template <class T>
std::vector<T> gather(cpu::Communicator& host, const T& mine) {
  std::vector<T> all;
  for (const std::string& bytes : host.gather({reinterpret_cast<const char*>(&mine), sizeof(T)})) {
    T value;
    std::memcpy(&value, bytes.data(), sizeof(T));
    all.push_back(value);
  }
  return all;
}

// Runs `step` on every rank; a collective. Empty if it threw on none, else what the first rank that failed says.
template <class F>
std::string agree(cpu::Communicator& host, const F& step) {
  struct Said {
    char text[512];
  } mine{};
  try {
    step();
  } catch (const std::exception& e) {
    std::strncpy(mine.text, *e.what() ? e.what() : "unknown error", sizeof(mine.text) - 1);
  }
  const std::vector<Said> all = gather(host, mine);
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].text[0] != '\0') return host.names().rank(static_cast<int>(r)) + ": " + all[r].text;
  }
  return "";
}

}  // namespace pycoll::bindings
