// The operating system, as far as pycoll needs it: descriptors, mappings, futexes, forks, cores.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace pycoll::cpu {

using Clock = std::chrono::steady_clock;

// A file descriptor that closes itself.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// A shared, writable mapping of a whole file.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int fd, size_t bytes);
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Anonymous shared memory of fixed size: it has no name, is not in /dev/shm, and can be neither shrunk nor grown by a
// peer.
Fd create_shared_memory(const char* label, size_t bytes);

// Takes the pages now, so that no collective pays for them.
void prefault(std::byte* begin, size_t bytes);

// Gives whole pages back to the system; they read as zero afterwards.
void release_pages(std::byte* begin, size_t bytes);

// How many of these bytes, whole pages, have memory by now.
size_t resident_bytes(std::byte* begin, size_t bytes);

// Sleeps until the low half of `word` is no longer `seen`, somebody wakes it, or the time is over.
void futex_wait(const uint64_t& word, uint32_t seen, std::chrono::microseconds at_most);
void futex_wake_all(const uint64_t& word);

// How many forks lie between the first process and this one: a communicator belongs to the process that made it.
uint64_t fork_generation();

// Blocks all signals while alive: threads started meanwhile inherit it, so that Python's handlers run on Python's
// thread.
class SignalsBlocked {
 public:
  SignalsBlocked();
  ~SignalsBlocked();

 private:
  alignas(16) unsigned char saved_[128];
};

int available_cores();        // that this process may run on
uint64_t physical_memory();   // bytes
uint64_t last_level_cache();  // bytes; a common size where the system does not say
std::string random_token();   // 32 hexadecimal digits
// Processes with the same one reach each other's abstract sockets: the machine and its network namespace. 0: not known.
uint64_t socket_place();
[[noreturn]] void throw_errno(const std::string& doing);

}  // namespace pycoll::cpu
