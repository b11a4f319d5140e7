#include "cpu/mail_match.h"

#include <algorithm>
#include <limits>

namespace pycoll::cpu {

std::optional<Announced> Matching::begin(const LetterPtr& receive) {
  const int64_t tag = receive->message.tag;
  const int peer = receive->message.peer;
  auto oldest = aside_.end();
  if (peer != kAnySource) {
    oldest = aside_.find({tag, peer});
  } else {
    for (auto i = aside_.lower_bound({tag, 0}); i != aside_.end() && i->first.first == tag; ++i) {
      if (oldest == aside_.end() || i->second.front().since < oldest->second.front().since) oldest = i;
    }
  }
  if (oldest == aside_.end()) {
    (peer == kAnySource ? any_ : from_[peer]).push_back({clock_++, receive});
    return std::nullopt;
  }
  Announced found = std::move(oldest->second.front().message);
  oldest->second.pop_front();
  if (oldest->second.empty()) aside_.erase(oldest);
  bytes_aside_ -= found.kept.size();
  return found;
}

Matching::Waitings::iterator Matching::find(Waitings& in, int64_t tag) {
  return std::find_if(in.begin(), in.end(), [tag](const Waiting& w) { return w.letter->message.tag == tag; });
}

LetterPtr Matching::answer(const Announced& message) {
  Waitings& named = from_[message.source];
  const auto by_name = find(named, message.tag), by_any = find(any_, message.tag);
  if (by_name == named.end() && by_any == any_.end()) {
    Aside aside{clock_++, message};
    aside.message.contents = nullptr;
    if (message.small) aside.message.kept.assign(message.contents, message.contents + message.bytes);
    bytes_aside_ += aside.message.kept.size();
    aside_[{message.tag, message.source}].push_back(std::move(aside));
    return nullptr;
  }
  const bool take_named = by_any == any_.end() || (by_name != named.end() && by_name->since < by_any->since);
  const auto oldest = take_named ? by_name : by_any;
  LetterPtr letter = std::move(oldest->letter);
  (take_named ? named : any_).erase(oldest);
  return letter;
}

void Matching::drain(Waitings& from, std::vector<LetterPtr>& to) {
  for (Waiting& w : from) to.push_back(std::move(w.letter));
  from.clear();
}

std::vector<LetterPtr> Matching::take_all(int source) {
  std::vector<LetterPtr> all;
  if (source != kAnySource) {
    drain(from_[source], all);
    return all;
  }
  for (Waitings& w : from_) drain(w, all);
  drain(any_, all);
  return all;
}

}  // namespace pycoll::cpu
