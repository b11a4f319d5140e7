// How ranks find and map one another's segments.
//
// 1. Each rank opens an abstract socket and puts its hello (protocol version, socket, token, wishes) into the store.
// 2. Having read all hellos, each rank computes the same geometry (the minimum of all wishes), makes its segment, and
//    pushes it with its liveness page
//    to every peer's socket (SCM_RIGHTS). A push needs no answer: the socket's queue keeps it.
// 3. Each rank puts what it reached, or its error, into the store, and reads what the others say.
// 4. If all reached all, each rank takes in what was pushed to it, checks the sender's user and token, and maps it.
//
// Locality is what step 2 finds: ranks that cannot push to each other do not share memory. Nothing here has a name in
// the file system.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/layout.h"
#include "cpu/liveness.h"
#include "cpu/names.h"
#include "cpu/os.h"
#include "cpu/recorder.h"

namespace pycoll::cpu {

// The key-value store through which ranks meet (torch's Store, or a map in tests). Keys are private to one
// communicator's ranks.
class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  virtual bool has(const std::string& key) = 0;
  virtual std::string get(const std::string& key) = 0;  // a key that is there
  virtual int64_t add(const std::string& key, int64_t amount) = 0;
  virtual void erase(const std::string& key) = 0;
};

// Wishes of one rank; the communicator gets the minimum over the ranks.
struct Config {
  int channels = 0;  // 0: as many as its share of the cores, at most 4
  int link_slots = 4;
  size_t slot_bytes = size_t{512} << 10;
  size_t link_bytes = size_t{128} << 10;
  size_t mail_bytes = size_t{128} << 10;  // a buffer of a lane (core/mailbox.h); memory is taken when a lane is used
  size_t heap_bytes = 0;
  size_t one_shot_max_bytes = size_t{32} << 10;  // `auto` takes one-shot to here, two-shot above
  size_t channel_min_bytes = size_t{512} << 10;  // a channel more for so many bytes of the tensor
  // GPUs only: words (core/words.h), and up to which size `auto` takes the algorithms that use them.
  size_t word_bytes = 0, one_shot_ll_max_bytes = 0, two_shot_ll_max_bytes = 0;

  // Of each wish the least.
  static Config least(const std::vector<Config>& wishes);
};

constexpr int kMostDeviceRanks = 16;  // of a communicator whose tensors are on GPUs

// The beginning of each segment, written by its owner alone.
struct Control {
  uint32_t departed;  // 1: closed in order
  uint32_t failed;    // 0: no; 1: being written; 2: the fields below say why
  int32_t kind;       // ErrorKind
  int32_t culprit;
  char text[1024];
  // Whom this rank waits for by now more than an instant, in a collective, and in a send or receive; and when it said so
  // last (cpu/wait.cpp).
  uint64_t waits_for, mail_waits_for;
  uint32_t closing;  // 1: starts no send or receive any more
  Doorbell doorbell;
  // For csrc/torch/cuda: how much of each rank's heap on a GPU this rank has mapped so far (csrc/README.md, G3).
  uint64_t mapped_device_heap[kMostDeviceRanks];
  uint32_t pid;
  Journal journals[kJournals];
};
static_assert(sizeof(Control) <= Geometry::kControlBytes);

struct Attachment {
  int rank = 0;
  Names names;
  std::string id;    // of the communicator, the same on all ranks
  Instant origin{};  // before anything of it was recorded
  Geometry geometry{};
  size_t one_shot_max_bytes = 0, channel_min_bytes = 0;
  int cores = 1;                       // the least any rank may run on
  std::vector<Mapping> segments;       // [world]
  std::vector<std::byte*> base;        // [world]
  std::vector<PeerLiveness> liveness;  // [world], empty for the own rank
  std::shared_ptr<Keeper> keeper;
  // To be erased by this rank when all have attached. Only rank 0 has any: the process that serves the store is often
  // its own, and may end soon after.
  std::vector<std::string> store_keys;

  PeerTable table() const { return {rank, geometry, base.data()}; }
  // How often a wait looks before it offers its core. With a core for each rank a short wait is cheapest spun; else the
  // peer we wait for needs our core.
  int spins() const { return geometry.world <= cores ? 4000 : 32; }
  Control& control(int r) const { return *reinterpret_cast<Control*>(base[r]); }
};

// Throws Error: kTimeout naming the ranks that did not come, kUnsupported if some ranks cannot share memory.
// `interrupt` is called now and then and may throw.
std::shared_ptr<Attachment> attach(Store& store, int rank, int world, const Config& config, const Names& names,
                                   Clock::time_point deadline, const std::function<void()>& interrupt);

}  // namespace pycoll::cpu
