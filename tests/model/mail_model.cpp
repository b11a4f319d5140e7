// Mail (csrc/README.md, M1 to M6, M9): who sends and receives what, with the fewest envelopes, buffers and grants.
#include "mail.h"
#include "report.h"

using namespace model;

namespace {

constexpr bool kReturns = false;  // a request that its thread does not wait for at once

Request send(uint8_t to, uint8_t tag, uint8_t chunks, bool waits = true) { return {true, to, tag, chunks, waits}; }
Request receive(uint8_t from, uint8_t tag, bool waits = true) { return {false, from, tag, 0, waits}; }

// Both ranks send what is large and what is small, then receive in the other order.
std::vector<MailThread> exchange() {
  const auto rank = [](uint8_t me, uint8_t peer) {
    return MailThread{me, {send(peer, 1, 2, kReturns), send(peer, 2, 0, kReturns), receive(peer, 2), receive(peer, 1)}};
  };
  return {rank(0, 1), rank(1, 0)};
}

// More than there is room for, of two tags.
std::vector<MailThread> stream() {
  return {{0, {send(1, 1, 3, kReturns), send(1, 1, 2, kReturns), send(1, 2, 0, kReturns), send(1, 1, 1)}},
          {1, {receive(0, 1, kReturns), receive(0, 2, kReturns), receive(0, 1, kReturns), receive(0, 1)}}};
}

// Small ones alone, the last one received first.
std::vector<MailThread> letters() {
  return {{0, {send(1, 1, 0), send(1, 1, 0), send(1, 1, 0), send(1, 2, 0)}},
          {1, {receive(0, 2), receive(0, 1), receive(0, 1), receive(0, 1)}}};
}

// Two threads of each rank, each with a tag of its own.
std::vector<MailThread> threads() {
  return {{0, {send(1, 1, 1), send(1, 1, 0)}},
          {0, {send(1, 2, 0), send(1, 2, 2)}},
          {1, {receive(0, 1), receive(0, 1)}},
          {1, {receive(0, 2), receive(0, 2)}}};
}

// A receiver that takes from any source, and by name in between.
std::vector<MailThread> any_source() {
  return {{0, {send(2, 1, 1, kReturns), send(2, 1, 0)}},
          {1, {send(2, 1, 0, kReturns), send(2, 2, 2)}},
          {2, {receive(kAnySource, 2), receive(0, 1, kReturns), receive(kAnySource, 1), receive(kAnySource, 1)}}};
}

// The receiver wants what comes from rank 0, while rank 1 has filled its ring.
std::vector<MailThread> full_ring() {
  return {{0, {send(2, 1, 2)}},
          {1, {send(2, 1, 0), send(2, 1, 1, kReturns), send(2, 1, 0)}},
          {2, {receive(0, 1), receive(1, 1), receive(1, 1), receive(1, 1)}}};
}

// Round in a circle: all start to send, then receive.
std::vector<MailThread> circle() {
  const auto rank = [](uint8_t me, uint8_t next, uint8_t previous) {
    return MailThread{me, {send(next, 1, 2, kReturns), receive(previous, 1)}};
  };
  return {rank(0, 1, 2), rank(1, 2, 0), rank(2, 0, 1)};
}

// What programs may not rely on: each waits for its send to end, and nobody receives.
std::vector<MailThread> mutual(uint8_t chunks, int count) {
  std::vector<MailThread> ranks{{0, {}}, {1, {}}};
  for (uint8_t r : {0, 1}) {
    for (int i = 0; i < count; ++i) ranks[r].requests.push_back(send(1 - r, 1, chunks));
    for (int i = 0; i < count; ++i) ranks[r].requests.push_back(receive(1 - r, 1));
  }
  return ranks;
}

// Every three messages of two tags, in every order in which their receives may come, that all start at once.
void every_three(const std::string& name, int e, int p, int g) {
  Outcome total;
  size_t cases = 0;
  for (int messages = 0; messages < 6 * 6 * 6; ++messages) {
    std::vector<Request> sends;
    std::vector<uint8_t> tags;
    for (int i = 0, rest = messages; i < 3; ++i, rest /= 6) {
      tags.push_back(static_cast<uint8_t>(rest % 2));
      sends.push_back(send(1, tags.back(), static_cast<uint8_t>(rest % 6 / 2), kReturns));
    }
    std::sort(tags.begin(), tags.end());
    do {
      for (const bool waits : {true, false}) {
        std::vector<Request> receives;
        for (const uint8_t tag : tags) receives.push_back(receive(0, tag, waits));
        const Outcome o = explore(Mail({{0, sends}, {1, receives}}, e, p, g));
        total.states += o.states;
        total.moves += o.moves;
        ++cases;
        if (o.problem.empty()) continue;
        total.problem = o.problem;
        total.trace = o.trace;
      }
    } while (std::next_permutation(tags.begin(), tags.end()));
  }
  report_holds(name + "three messages, " + std::to_string(cases) + " cases", total);
}

}  // namespace

int main() {
  for (int room = 0; room < 8; ++room) {
    const int e = 1 + room % 2, p = 1 + room / 2 % 2, g = 1 + room / 4;
    const std::string name = "E " + std::to_string(e) + ", P " + std::to_string(p) + ", G " + std::to_string(g) + ": ";
    const auto all_well = [&](const char* what, const std::vector<MailThread>& t) {
      holds(name + what, Mail(t, e, p, g));
    };
    all_well("exchange", exchange());
    all_well("stream", stream());
    all_well("letters in reverse", letters());
    all_well("two threads a rank", threads());
    all_well("any source", any_source());
    all_well("a full ring", full_ring());
    all_well("circle", circle());
    every_three(name, e, p, g);
  }
  // The limits: a large send ends only once it is received, a small one once the ring has room.
  for (const int room : {1, 2}) {
    holds("mutual small sends", Mail(mutual(0, room), room, 1, 1));
    fails("mutual small sends, one too many", Mail(mutual(0, room + 1), room, 1, 1), "deadlock");
    fails("mutual large sends", Mail(mutual(1, 1), room, room, room), "deadlock");
  }

  const auto wrong = [](const char* name, const std::vector<MailThread>& t, int room, const MailMutation& m,
                        const char* what) { fails(name, Mail(t, room, room, room, m), what); };
  wrong("C2: post before the envelope", exchange(), 1, {.post_first = true}, "envelope");
  wrong("C2: place freed before it is read", stream(), 1, {.release_first = true}, "envelope");
  wrong("M2: one envelope more than there is room for", letters(), 2, {.envelopes = 1}, "envelope");
  wrong("M5: one chunk more", stream(), 2, {.chunks = 1}, "chunk");
  wrong("M4: one grant more", stream(), 1, {.grants = 1}, "grant");
  wrong("M4: the newest grant first", stream(), 2, {.newest_grant = true}, "chunk");
  wrong("M3: does not look aside", letters(), 2, {.aside_ignored = true}, "deadlock");
  wrong("M3: newest aside", letters(), 2, {.newest_aside = true}, "order");
  wrong("M3: newest receive", stream(), 2, {.newest_receive = true}, "younger receive");
  wrong("M9: all that can be done after the news", stream(), 2, {.gives_up_early = true}, "lost");
  return check::report();
}
