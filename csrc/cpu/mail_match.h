// Which receive gets which message (M3): the receives that have met none, and the messages that were taken from their
// lanes while nobody wanted them.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/mail_letter.h"

namespace pycoll::cpu {

// A message that has been announced: what its envelope said.
struct Announced {
  int source;
  uint64_t number;  // in its lane
  uint64_t bytes, kind;
  int64_t tag;
  bool small;
  const std::byte* contents;    // of a small one, in the envelope
  std::vector<std::byte> kept;  // or here, when it lies aside
};

class Matching {
 public:
  explicit Matching(int world) : from_(world) {}

  // A receive begins: what lies aside for it, the oldest first; else it is kept until answer() gives it a message.
  std::optional<Announced> begin(const LetterPtr& receive);
  bool wanted(int source) const { return !any_.empty() || !from_[source].empty(); }
  bool from_any() const { return !any_.empty(); }
  // The oldest receive that may have this message; else puts it aside and returns null.
  LetterPtr answer(const Announced& message);

  bool wanted_by_name(int source) const { return !from_[source].empty(); }
  size_t bytes_aside() const { return bytes_aside_; }
  // Takes out all receives that have met no message; of one source alone, or of kAnySource and all.
  std::vector<LetterPtr> take_all(int source);

 private:
  struct Waiting {
    uint64_t since;
    LetterPtr letter;
  };
  using Waitings = std::deque<Waiting>;
  struct Aside {
    uint64_t since;
    Announced message;
  };
  static Waitings::iterator find(Waitings& in, int64_t tag);
  static void drain(Waitings& from, std::vector<LetterPtr>& to);

  uint64_t clock_ = 0;          // counts what comes, so that the oldest can be told
  std::vector<Waitings> from_;  // [world] by named source
  Waitings any_;
  std::map<std::pair<int64_t, int>, std::deque<Aside>> aside_;  // by tag and source
  size_t bytes_aside_ = 0;
};

}  // namespace pycoll::cpu
