// What each case of a model says, and must say.
#pragma once

#include <cstdio>
#include <string>

#include "check.h"
#include "explore.h"

namespace model {

// The protocol as it is: nothing is wrong in any state.
inline void report_holds(const std::string& name, const Outcome& o) {
  std::printf("%-72s %8zu states %9zu moves\n", name.c_str(), o.states, o.moves);
  if (!o.problem.empty()) std::printf("%s:\n%s", o.problem.c_str(), o.trace.c_str());
  CHECK_EQ(o.problem, "");
}
template <class Model>
void holds(const std::string& name, const Model& m) {
  report_holds(name, explore(m));
}

// Made wrong on purpose: the checker finds it.
template <class Model>
void fails(const std::string& name, const Model& m, const std::string& problem) {
  const Outcome o = explore(m);
  std::printf("%-72s %8zu states: %s\n", ("not " + name).c_str(), o.states, o.problem.c_str());
  CHECK_EQ(o.problem, problem);
}

}  // namespace model
