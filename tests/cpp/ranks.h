// Runs a function as every rank, each in a thread of this program, over a real communicator.
#pragma once

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/error.h"
#include "store.h"

using Milliseconds = std::chrono::milliseconds;

// Small slots and links, so that little data runs many rounds.
inline pycoll::cpu::Config small_config(int channels = 1) {
  pycoll::cpu::Config c;
  c.channels = channels;
  c.slot_bytes = 2048;
  c.link_bytes = 512;
  c.link_slots = 3;
  c.mail_bytes = 512;
  c.heap_bytes = size_t{32} << 20;
  c.channel_min_bytes = 1000;
  return c;
}

// The text of the error of each rank, empty where there was none; the kinds in `kinds` if given.
inline std::vector<std::string> run_ranks(int world, const pycoll::cpu::Config& config, Milliseconds timeout,
                                          const std::function<void(pycoll::cpu::Communicator&)>& f,
                                          std::vector<pycoll::cpu::ErrorKind>* kinds = nullptr,
                                          const pycoll::cpu::Names& names = {}) {
  MapStore store;
  std::vector<std::string> errors(world);
  std::vector<pycoll::cpu::ErrorKind> found(world, pycoll::cpu::ErrorKind{});
  std::vector<std::thread> threads;
  for (int r = 0; r < world; ++r) {
    threads.emplace_back([&, r] {
      try {
        pycoll::cpu::Communicator comm(store, r, world, config, timeout, names);
        f(comm);
      } catch (const pycoll::cpu::Error& e) {
        errors[r] = e.what();
        found[r] = e.kind;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  if (kinds != nullptr) *kinds = found;
  return errors;
}
