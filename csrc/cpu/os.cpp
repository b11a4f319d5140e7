#include "cpu/os.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <climits>
#include <cstring>
#include <fstream>
#include <functional>
#include <mutex>
#include <vector>

#include "cpu/error.h"

namespace pycoll::cpu {

void throw_errno(const std::string& doing) {
  throw Error(ErrorKind::kError, "pycoll: " + doing + ": " + std::strerror(errno));
}

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

Mapping::Mapping(int fd, size_t bytes) : size_(bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) {
    throw_errno("mapping " + std::to_string(bytes >> 20) +
                " MiB of address space failed (a smaller Config.heap_bytes needs less; see also ulimit -v)");
  }
  data_ = static_cast<std::byte*>(p);
  madvise(data_, bytes, MADV_HUGEPAGE);  // best effort: fewer page faults and TLB misses where the system allows it
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

Fd create_shared_memory(const char* label, size_t bytes) {
  Fd fd(memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) throw_errno("memfd_create failed");
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) throw_errno("sizing shared memory failed");
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) throw_errno("sealing failed");
  return fd;
}

void prefault(std::byte* begin, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  const auto address = reinterpret_cast<uintptr_t>(begin), start = address / 4096 * 4096;
  if (madvise(reinterpret_cast<void*>(start), address + bytes - start, MADV_POPULATE_WRITE) == 0) return;
  if (errno == ENOMEM || errno == EFAULT) throw_errno("no memory for " + std::to_string(bytes >> 20) + " MiB");
#endif
  for (size_t i = 0; i < bytes; i += 4096) std::atomic_ref<std::byte>(begin[i]).load(std::memory_order_relaxed);
}

void release_pages(std::byte* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + 4095) / 4096 * 4096, last = (address + bytes) / 4096 * 4096;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_REMOVE);
}

size_t resident_bytes(std::byte* begin, size_t bytes) {
  const size_t page = 4096;
  std::vector<unsigned char> pages(bytes / page);
  if (pages.empty() || mincore(begin, pages.size() * page, pages.data()) != 0) return 0;
  return page * std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
}

void futex_wait(const uint64_t& word, uint32_t seen, std::chrono::microseconds at_most) {
  static_assert(std::endian::native == std::endian::little, "the low half of a counter is its first word");
  const timespec t{at_most.count() / 1000000, at_most.count() % 1000000 * 1000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

void futex_wake_all(const uint64_t& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

namespace {
std::atomic<uint64_t> generation{0};
}

uint64_t fork_generation() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return generation.load(std::memory_order_relaxed);
}

static_assert(sizeof(sigset_t) <= 128);

SignalsBlocked::SignalsBlocked() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, reinterpret_cast<sigset_t*>(saved_));
}

SignalsBlocked::~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, reinterpret_cast<sigset_t*>(saved_), nullptr); }

int available_cores() {
  cpu_set_t set;
  int cores =
      sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");  // "<quota|max> <period>": a container's share of the machine
  double quota = 0, period = 0;
  if (quota_file >> quota >> period && period > 0) cores = std::min(cores, static_cast<int>(quota / period + 0.5));
  return std::max(cores, 1);
}

uint64_t physical_memory() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t last_level_cache() {
  static const uint64_t kBytes = [] {  // sysconf speaks of a whole processor, of which a virtual machine has a part
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // such as 32768K
    uint64_t kib = 0;
    return file >> kib ? kib << 10 : uint64_t{32} << 20;
  }();
  return kBytes;
}

uint64_t socket_place() {
  std::ifstream boot_file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  struct stat space{};
  if (!(boot_file >> boot) || stat("/proc/self/ns/net", &space) != 0) return 0;
  return std::hash<std::string>()(boot + "/" + std::to_string(space.st_dev) + "/" + std::to_string(space.st_ino)) | 1;
}

std::string random_token() {
  unsigned char raw[16];
  if (getrandom(raw, sizeof(raw), 0) != sizeof(raw)) throw_errno("getrandom failed");
  std::string token;
  for (const unsigned char b : raw) {
    token += "0123456789abcdef"[b >> 4];
    token += "0123456789abcdef"[b & 15];
  }
  return token;
}

}  // namespace pycoll::cpu
