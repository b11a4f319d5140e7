// A small explicit-state model checker: every interleaving of a model's moves, each state visited once.
//
// A model is a class with
//   State            trivially copyable, without padding: all that the future depends on
//   State initial()
//   void moves(const State&, emit)   calls emit(next, who, what) for each move that somebody can make now
//   const char* wrong(const State&)  what is wrong in this state, or null
//   bool finished(const State&)      everybody has done everything
// What is checked: no state is wrong; a state without moves is finished (no deadlock, no lost wake-up); and from every
// state a finished one can be reached (nobody runs in circles, or starves whatever the others do).
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace model {

struct Outcome {
  size_t states = 0;
  size_t moves = 0;
  std::string problem;  // empty: none
  std::string trace;    // the shortest way there
};

template <class Model>
class Explorer {
 public:
  using State = typename Model::State;
  static_assert(std::is_trivially_copyable_v<State> && std::has_unique_object_representations_v<State>,
                "states are compared byte by byte");

  explicit Explorer(const Model& model) : model_(model), table_(size_t{1} << 12, kNone) {}

  Outcome run() {
    add(model_.initial(), 0);
    for (size_t i = 0; i < states_.size(); ++i) {
      begin_.push_back(next_.size());
      const State state = states_[i];  // by value: the vector grows
      if (const char* wrong = model_.wrong(state)) return found(wrong, i);
      model_.moves(state,
                   [&](const State& next, int, const char*) { next_.push_back(add(next, static_cast<uint32_t>(i))); });
      if (next_.size() == begin_[i] && !model_.finished(state)) return found("deadlock", i);
      if (states_.size() > kTooMany) return found("too many states", i);
    }
    begin_.push_back(next_.size());
    const std::vector<bool> can_finish = reaches_end();
    for (size_t i = 0; i < states_.size(); ++i) {
      if (!can_finish[i]) return found("cannot finish any more", i);
    }
    return {states_.size(), next_.size(), "", ""};
  }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr size_t kTooMany = 8'000'000;

  static uint64_t hash(const State& state) {
    uint64_t h = 0x9e3779b97f4a7c15u;
    unsigned char bytes[(sizeof(State) + 7) / 8 * 8] = {};
    std::memcpy(bytes, &state, sizeof(State));
    for (size_t i = 0; i < sizeof bytes; i += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + i, 8);
      h = (h ^ word) * 0xff51afd7ed558ccdu;
      h ^= h >> 32;
    }
    return h;
  }

  // The number of a state, new or known. States are numbered in the order of their distance from the first one.
  uint32_t add(const State& state, uint32_t parent) {
    if (2 * states_.size() >= table_.size()) grow();
    size_t at = hash(state) & (table_.size() - 1);
    for (; table_[at] != kNone; at = (at + 1) & (table_.size() - 1)) {
      if (std::memcmp(&states_[table_[at]], &state, sizeof(State)) == 0) return table_[at];
    }
    states_.push_back(state);
    parent_.push_back(parent);
    return table_[at] = static_cast<uint32_t>(states_.size() - 1);
  }

  void grow() {
    table_.assign(2 * table_.size(), kNone);
    for (size_t i = 0; i < states_.size(); ++i) {
      size_t at = hash(states_[i]) & (table_.size() - 1);
      while (table_[at] != kNone) at = (at + 1) & (table_.size() - 1);
      table_[at] = static_cast<uint32_t>(i);
    }
  }

  // From which states a finished one can be reached: backwards along the moves.
  std::vector<bool> reaches_end() const {
    std::vector<uint32_t> before_begin(states_.size() + 1), before(next_.size());
    for (const uint32_t to : next_) ++before_begin[to];
    for (size_t i = 1; i <= states_.size(); ++i) before_begin[i] += before_begin[i - 1];
    for (size_t from = 0; from < states_.size(); ++from) {
      for (size_t m = begin_[from]; m < begin_[from + 1]; ++m) before[--before_begin[next_[m]]] = from;
    }
    std::vector<bool> reaches(states_.size());
    std::vector<uint32_t> open;
    for (size_t i = 0; i < states_.size(); ++i) {
      if (!model_.finished(states_[i])) continue;
      reaches[i] = true;
      open.push_back(static_cast<uint32_t>(i));
    }
    while (!open.empty()) {
      const uint32_t to = open.back();
      open.pop_back();
      for (size_t m = before_begin[to]; m < before_begin[to + 1]; ++m) {
        if (reaches[before[m]]) continue;
        reaches[before[m]] = true;
        open.push_back(before[m]);
      }
    }
    return reaches;
  }

  // Only the numbers of states are kept, so each move of the way there is looked up again.
  Outcome found(const std::string& problem, size_t at) const {
    std::vector<size_t> way{at};
    while (way.back() != 0) way.push_back(parent_[way.back()]);
    std::string trace;
    for (size_t i = way.size() - 1; i > 0; --i) {
      const State& to = states_[way[i - 1]];
      bool named = false;
      model_.moves(states_[way[i]], [&](const State& next, int who, const char* what) {
        if (named || std::memcmp(&next, &to, sizeof(State)) != 0) return;
        named = true;
        trace += "  " + std::to_string(who) + ": " + what + "\n";
      });
    }
    return {states_.size(), next_.size(), problem, trace};
  }

  const Model& model_;
  std::vector<State> states_;
  std::vector<uint32_t> parent_;
  std::vector<uint32_t> table_;  // of numbers of states, by hash, open addressing
  std::vector<size_t> begin_;    // the moves of state i lead to next_[begin_[i]] .. next_[begin_[i + 1] - 1]
  std::vector<uint32_t> next_;
};

template <class Model>
Outcome explore(const Model& model) {
  return Explorer<Model>(model).run();
}

}  // namespace model
