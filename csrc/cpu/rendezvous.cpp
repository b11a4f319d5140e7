#include "cpu/rendezvous.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace pycoll::cpu {

namespace {

constexpr uint64_t kProtocol = 0x70796308;  // changes whenever a segment's layout or its use does
constexpr const char *kHello = "hello", *kReached = "reached";
constexpr const char* kReachedAll = "0";  // else an error: its kind, the rank to blame, a space and its text

std::string to_bytes(const Hello& value) { return {reinterpret_cast<const char*>(&value), sizeof(value)}; }

Hello from_bytes(const std::string& bytes) {
  Hello value{};
  if (bytes.size() == sizeof(value)) std::memcpy(&value, bytes.data(), sizeof(value));
  if (value.protocol != kProtocol) throw Error(ErrorKind::kError, "pycoll: ranks run different versions of pycoll");
  return value;
}

void throw_if_failed(const std::string& said) {
  if (said == kReachedAll) return;
  const size_t space = said.find(' ');
  throw Error(static_cast<ErrorKind>(said.at(0) - '0'), said.substr(space + 1), std::stoi(said.substr(1)));
}

}  // namespace

// A store may still hold keys of an earlier communicator of the same name: count them.
Rendezvous::Rendezvous(Store& store, int rank, int world, const Names& names, Clock::time_point deadline,
                       const std::function<void()>& interrupt)
    : store_(store),
      rank_(rank),
      world_(world),
      names_(names),
      deadline_(deadline),
      interrupt_(interrupt),
      prefix_(std::to_string(store.add("count/" + std::to_string(rank), 1)) + "/") {}

std::string Rendezvous::key(const char* what, int rank) const { return prefix_ + what + "/" + std::to_string(rank); }

void Rendezvous::greet(const Hello& mine) {
  Hello hello = mine;
  hello.protocol = kProtocol;
  store_.set(key(kHello, rank_), to_bytes(hello));
}

void Rendezvous::say_reached_all() { store_.set(key(kReached, rank_), kReachedAll); }

void Rendezvous::say_failed(const Error& why) {
  store_.set(key(kReached, rank_),
             static_cast<char>('0' + static_cast<int>(why.kind)) + std::to_string(why.rank) + " " + why.what());
}

// Every value of `what`, as soon as all ranks have set theirs.
std::vector<std::string> Rendezvous::await_all(const char* what, const std::function<void()>& meanwhile) {
  auto pause = std::chrono::microseconds(200);
  std::vector<std::string> values(world_);
  for (int r = 0; r < world_;) {
    if (store_.has(key(what, r))) {
      values[r] = store_.get(key(what, r));
      ++r;
      continue;
    }
    if (Clock::now() > deadline_) throw missing(what);
    interrupt_();
    meanwhile();
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 3 / 2, std::chrono::microseconds(20000));
  }
  return values;
}

Error Rendezvous::missing(const char* what) {
  std::vector<int> ranks;
  for (int r = 0; r < world_; ++r) {
    if (!store_.has(key(what, r))) ranks.push_back(r);
  }
  if (ranks.empty()) ranks.push_back(world_ - 1);  // it came as we gave up
  return Error(ErrorKind::kTimeout,
               "pycoll: " + names_.ranks(ranks) + " of " + std::to_string(world_) +
                   " did not join in time. Were all ranks started, with the same world size and store, and do all "
                   "create this communicator? Raise the timeout if they are slow",
               ranks.front());
}

std::vector<Hello> Rendezvous::hellos() {
  std::vector<Hello> all;
  for (const std::string& bytes : await_all(kHello, [] {})) {
    all.push_back(from_bytes(bytes));
    if (all.back().world != world_) {
      throw Error(ErrorKind::kMismatch, "pycoll: " + names_.rank(static_cast<int>(all.size()) - 1) +
                                            " says the world size is " + std::to_string(all.back().world) + ", " +
                                            names_.rank(rank_) + " says " + std::to_string(world_));
    }
  }
  return all;
}

void Rendezvous::hear_all(const std::function<void()>& meanwhile) {
  for (const std::string& said : await_all(kReached, meanwhile)) throw_if_failed(said);
}

bool Rendezvous::has_reported(int rank) {
  if (!store_.has(key(kReached, rank))) return false;
  throw_if_failed(store_.get(key(kReached, rank)));
  return true;
}

std::vector<std::string> Rendezvous::keys() const {
  std::vector<std::string> all;
  for (int r = 0; r < world_; ++r) {
    for (const char* what : {kHello, kReached}) all.push_back(key(what, r));
  }
  return all;
}

}  // namespace pycoll::cpu
