// core/copy_strided.h, the loop that GPUs run, on host threads that share it: any length and alignment of both ends, and
// nothing beside them; no byte by two threads, as ThreadSanitizer sees.
#include <thread>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "core/copy_strided.h"

using namespace pycoll;

namespace {

struct Share {
  size_t at, count;
  size_t thread() const { return at; }
  size_t size() const { return count; }
};

void copy_by_threads(void* dst, const void* src, size_t bytes) {
  constexpr size_t kThreads = 3;
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t)
    threads.emplace_back([=] { copy_strided(Share{t, kThreads}, dst, src, bytes); });
  for (std::thread& thread : threads) thread.join();
}

void check_copy(size_t bytes, size_t to_shift, size_t from_shift) {
  Bytes content(bytes);
  for (size_t i = 0; i < bytes; ++i) content[i] = static_cast<std::byte>(i * 7 + i / 256 + bytes);
  Buffer from(content, from_shift), to(bytes, to_shift);
  const size_t word = strided::longest_word(to.data(), from.data());
  CHECK(word == 16 || to_shift % (2 * word) != from_shift % (2 * word));
  CHECK_EQ(to_shift % word, from_shift % word);
  copy_by_threads(to.data(), from.data(), bytes);
  CHECK(to.content() == content);
  CHECK(from.content() == content);
  CHECK(to.guards_intact() && from.guards_intact());
  copy_by_threads(to.data(), to.data(), bytes);
  CHECK(to.content() == content);
}

}  // namespace

int main() {
  // Three threads take 384 bytes in their longest words at once, and then by turns 192, 96 and 48.
  for (const size_t bytes : {0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 100, 383, 384, 385, 500, 721, 2000}) {
    for (const size_t to_shift : {0, 1, 2, 4, 8, 15}) {
      for (const size_t from_shift : {0, 1, 2, 3, 4, 6, 8, 12, 15}) check_copy(bytes, to_shift, from_shift);
    }
  }
  copy_by_threads(nullptr, nullptr, 0);
  return check::report();
}
