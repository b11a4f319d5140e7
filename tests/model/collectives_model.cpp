// Collectives (csrc/README.md, C2, W1 to W6, L1 to L5, F2, F5), by 2 and 3 ranks that run csrc/algorithms.
#include <string>
#include <vector>

#include "record.h"
#include "report.h"

using namespace model;
using pycoll::Algorithm;
using pycoll::Collective;
using pycoll::kGrain;

namespace {

struct Named {
  std::string name;
  Call call;
};

// `in_heap`: the ranks (bits) whose tensors lie in their heaps.
Call all_reduce(Algorithm a, int rounds, int world, uint32_t in_heap = 0) {
  const size_t chunks = a == Algorithm::kTree ? 1 : world;  // of a round
  return {Collective::kAllReduce, a, kGrain * chunks * rounds, in_heap};
}

std::string ranks(int world) { return std::to_string(world) + " ranks, "; }

// Every sequence of `length` of these calls, as one case.
void every_sequence_holds(const std::string& name, int world, const std::vector<Named>& calls, int length,
                          Order order) {
  Outcome total;
  size_t sequences = 1;
  for (int i = 0; i < length; ++i) sequences *= calls.size();
  for (size_t s = 0; s < sequences; ++s) {
    std::vector<Call> sequence;
    std::string text;
    for (size_t i = 0, rest = s; i < static_cast<size_t>(length); ++i, rest /= calls.size()) {
      sequence.push_back(calls[rest % calls.size()].call);
      text += calls[rest % calls.size()].name + "; ";
    }
    const Outcome o = explore(Ranks(Recording(world, sequence).program(), order));
    total.states += o.states;
    total.moves += o.moves;
    if (o.problem.empty()) continue;
    total.problem = o.problem;
    total.trace += text + o.problem + "\n" + o.trace;
  }
  report_holds(ranks(world) + name + ": " + std::to_string(sequences) + " sequences", total);
}

// A mutation, and what the rank is about that finds something wrong; or "deadlock".
struct Wrong {
  const char* name;
  Mutation mutation;
  std::vector<Call> calls;
  const char* problem;
  Order order = Order::kSequential;
};
void all_fail(int world, const std::vector<Wrong>& all) {
  for (const Wrong& w : all) {
    fails(ranks(world) + w.name, Ranks(Recording(world, w.calls, w.mutation).program(), w.order), w.problem);
  }
}

// Window barriers, records and slots.
void windows(int world) {
  const uint32_t all = (1u << world) - 1;
  const Call one_shot = all_reduce(Algorithm::kOneShot, 1, world), two_shot = all_reduce(Algorithm::kTwoShot, 1, world);
  const Call long_two_shot = all_reduce(Algorithm::kTwoShot, 2, world);
  const Call in_heaps = all_reduce(Algorithm::kTwoShot, 2, world, all);
  const std::vector<Named> calls{
      {"one-shot", one_shot},
      {"one-shot, 2 rounds", all_reduce(Algorithm::kOneShot, 2, world)},
      {"two-shot", two_shot},
      {"two-shot, 2 rounds", long_two_shot},
      {"two-shot in heaps", in_heaps},
      {"two-shot, rank 0 in its heap", all_reduce(Algorithm::kTwoShot, 2, world, 1)},
      {"reduce-scatter", {Collective::kReduceScatter, Algorithm::kDirect, kGrain * world}},
      {"all-gather in heaps", {Collective::kAllGather, Algorithm::kDirect, kGrain, all}},
      {"broadcast", {Collective::kBroadcast, Algorithm::kDirect, kGrain}},
  };
  every_sequence_holds("W1-W6", world, calls, 3, Order::kSequential);
  every_sequence_holds("W1-W6, any order that C2 allows", world, calls, 2, Order::kReleaseAcquire);
  const std::vector<Named> others{
      {"reduce", {Collective::kReduce, Algorithm::kDirect, kGrain * world}},
      {"gather", {Collective::kGather, Algorithm::kDirect, kGrain}},
      {"scatter", {Collective::kScatter, Algorithm::kDirect, kGrain * world}},
      {"all-to-all", {Collective::kAllToAll, Algorithm::kDirect, kGrain}},
      {"all-to-all in heaps", {Collective::kAllToAll, Algorithm::kDirect, kGrain, all}},
      {"two-shot", two_shot},
  };
  every_sequence_holds("W1-W6, other collectives", world, others, 2, Order::kSequential);
  every_sequence_holds("W1-W6, other collectives, any order that C2 allows", world, others, 2, Order::kReleaseAcquire);

  // W3: whatever came before, all find from the records of this very call that one rank calls something else.
  Call other = two_shot;
  other.mismatch = true;
  for (const Call& before : {one_shot, two_shot}) {
    for (const Order order : {Order::kSequential, Order::kReleaseAcquire}) {
      holds(ranks(world) + "W3: mismatch", Ranks(Recording(world, {before, other}).program(), order));
    }
  }

  all_fail(
      world,
      {{"W1: a barrier passed early", {.early = true}, {one_shot}, "compares the records"},
       {"W3: one cell for both parities", {.one_cell = true}, {one_shot, one_shot}, "compares the records"},
       {"W5: one slot for both parities", {.one_slot = true}, {one_shot, one_shot}, "combines"},
       {"W5: one slot for both parities", {.one_slot = true}, {two_shot, one_shot, one_shot}, "copies"},
       {"W5: results where others publish", {.one_place = true}, {long_two_shot, long_two_shot}, "combines"},
       {"W5: no barrier at the end",
        {.no_last_barrier = true, .no_records = true},
        {two_shot, one_shot, one_shot},
        "copies"},
       {"W6: no barrier at the end", {.no_last_barrier = true, .no_records = true}, {in_heaps, one_shot}, "combines"},
       {"C2: post before the record", {.post_before_moves = true}, {one_shot}, "compares the records"},
       {"C2: relaxed posts", {}, {one_shot}, "combines", Order::kRelaxed}});
}

// Connections with credits.
void links(int world) {
  const Call ring = all_reduce(Algorithm::kRing, 2, world), tree = all_reduce(Algorithm::kTree, 3, world);
  std::vector<Named> calls{{"ring", all_reduce(Algorithm::kRing, 1, world)},
                           {"ring, 2 rounds", ring},
                           {"tree", all_reduce(Algorithm::kTree, 1, world)},
                           {"tree, 3 rounds", tree}};
  every_sequence_holds("L1-L5", world, calls, 3, Order::kSequential);
  every_sequence_holds("L1-L5, any order that C2 allows", world, calls, 2, Order::kReleaseAcquire);
  for (const Call& call : {ring, tree}) {
    const Recording three_buffers(world, {call, call}, {.link_slots = 3});
    holds(ranks(world) + "L1-L5: three buffers", Ranks(three_buffers.program(), Order::kSequential));
  }
  calls.push_back({"one-shot", all_reduce(Algorithm::kOneShot, 1, world)});
  calls.push_back({"two-shot", all_reduce(Algorithm::kTwoShot, 1, world)});
  every_sequence_holds("L3, links and windows in turn", world, calls, 2, Order::kSequential);

  all_fail(world, {{"L4: ring with one buffer", {.link_slots = 1}, {ring}, "deadlock"},
                   {"C2: post before the message", {.post_before_moves = true, .no_records = true}, {ring}, "combines"},
                   {"C2: relaxed posts", {.no_records = true}, {ring}, "combines", Order::kRelaxed}});
  if (world == 2) return;  // who sends a message for each that it gets needs no credit, nor does a tree of lag S - 1
  all_fail(world, {{"L2: sends without credit", {.no_credit = true}, {ring}, "combines"},
                   {"L2: credit before the read", {.credit_first = true}, {ring}, "combines"}});
}

// A rank that waits may fail at any moment (a time-out, an interrupt): it says so, and its user writes into its tensors.
// Whoever finds that out fails too. Success may be returned only by who read nothing of what was written then.
void failures(int world) {
  const uint32_t any = (1u << world) - 1;
  const Call one_shot = all_reduce(Algorithm::kOneShot, 1, world);
  const Call in_heaps = all_reduce(Algorithm::kTwoShot, 2, world, any);
  const Call one_in_heap = all_reduce(Algorithm::kTwoShot, 2, world, 1);
  const Call gather{Collective::kAllGather, Algorithm::kDirect, kGrain, any};
  for (const Call& call : {in_heaps, one_in_heap, gather}) {
    const Program p = Recording(world, {call, one_shot}).program();
    holds(ranks(world) + "F5: one rank fails", Ranks(p, Order::kSequential, 1));
    holds(ranks(world) + "F5: any rank fails", Ranks(p, Order::kSequential, any));
    holds(ranks(world) + "F5: any rank fails, any order that exchanges allow", Ranks(p, Order::kFences, any));
  }
  const Program p = Recording(world, {in_heaps}).program();
  const Program unseeing = Recording(world, {in_heaps}, {.no_look = true}).program();
  fails(ranks(world) + "F5: no look at the end", Ranks(unseeing, Order::kSequential, any), "combines");
  fails(ranks(world) + "F5: a look that passes the posts", Ranks(p, Order::kReleaseAcquire, any), "combines");
  fails(ranks(world) + "F2: uses its tensors first", Ranks(p, Order::kSequential, any, true), "combines");
}

}  // namespace

int main() {
  for (const int world : {2, 3}) {
    windows(world);
    links(world);
    failures(world);
  }
  return check::report();
}
