#include "cpu/trace.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <vector>

#include "cpu/json.h"
#include "cpu/os.h"
#include "cpu/recorder.h"

namespace pycoll::cpu {

namespace {

constexpr int kFormat = 1;             // of the JSON; changes when what reads it must
constexpr size_t kMostEntries = 8192;  // of all ranks, in each kind of journal

std::string name_of_host() {
  char name[256] = {};
  (void)gethostname(name, sizeof(name) - 1);
  return name;
}

const char* state_of(const Entry& e) {
  if (e.end == 0) return "begun";
  if (e.failed) return "failed";
  if ((e.flags & Entry::kCaptured) != 0) return "captured";
  return e.deed == Deed::kLaunch ? "launched" : "ended";
}

void write_error(Json& json, const std::optional<Error>& error) {
  json.key("error");
  if (!error) {
    json.null();
    return;
  }
  json.open('{').key("kind").value(name(error->kind)).key("text").value(error->what());
  json.key("rank").value(error->rank).close('}');
}

void write_call(Json& json, const Entry& e, int world) {
  const bool all_to_all = e.collective == Collective::kAllToAll;
  const InOut elements = elements_of(e.collective, e.count, world);
  const uint64_t count = all_to_all ? e.count : std::max(elements.in, elements.out);
  json.key("call").value(name(e.collective));
  json.key("bytes").value(count * size_of(e.dtype));
  if (e.collective != Collective::kBarrier) {
    json.key("dtype").value(name(e.dtype)).key("count").value(e.count).key("shape").value(e.shape);
  }
  if (reduces(e.collective)) json.key("op").value(name(e.op));
  if (has_root(e.collective)) json.key("root").value(e.peer);
  json.key("algorithm").value(name(e.algorithm)).key("channels").value(e.channels);
}

void write_entry(Json& json, const Entry& e, int world, const Timebase& time) {
  json.open('{').key("n").value(e.number).key("sequence").value(e.sequence).key("state").value(state_of(e));
  json.key("begin_ns").value(time.ns(e.begin)).key("end_ns");
  e.end == 0 ? json.null() : json.value(time.ns(e.end));
  if (e.deed == Deed::kSend || e.deed == Deed::kReceive) {
    json.key("call").value(e.deed == Deed::kSend ? "send" : "recv").key("bytes").value(e.count);
    json.key("peer").value(e.peer).key("tag").value(e.tag);
  } else {
    write_call(json, e, world);
  }
  if ((e.flags & Entry::kQueued) != 0) json.key("queued").yes();
  if ((e.flags & Entry::kOnGpu) != 0) json.key("gpu").yes();
  json.close('}');
}

// Journals first, since they go on.
struct Seen {
  explicit Seen(const Journal (&journals)[kJournals], size_t most) {
    for (int k = 0; k < kJournals; ++k) entries[k] = read(journals[k], most);
  }
  std::vector<Entry> entries[kJournals];
};

void write_journals(Json& json, const Seen& seen, int world, const Timebase& time) {
  constexpr const char* names[] = {"calls", "messages", "launches"};
  for (int k = 0; k < kJournals; ++k) {
    json.key(names[k]).open('[');
    for (const Entry& e : seen.entries[k]) write_entry(json, e, world, time);
    json.close(']');
  }
}

// Messages and collectives have names of their own; a launch is a collective on a GPU.
void write_totals(Json& json, const Journal (&journals)[kJournals], const Timebase& time) {
  json.key("totals").open('{');
  for (int sort = 0; sort < Journal::kSorts; ++sort) {
    Journal::Total sum{};
    for (const Journal& journal : journals) {
      const Journal::Total& t = journal.totals[sort];
      sum.calls += load_relaxed(t.calls), sum.bytes += load_relaxed(t.bytes), sum.ticks += load_relaxed(t.ticks);
    }
    if (sum.calls == 0) continue;
    json.key(sort == Journal::kSend      ? "send"
             : sort == Journal::kReceive ? "recv"
                                         : name(static_cast<Collective>(sort)));
    json.open('{').key("calls").value(sum.calls).key("bytes").value(sum.bytes);
    json.key("ns").value(time.span(sum.ticks)).close('}');
  }
  json.close('}');
}

// What of a name may be in a file's.
std::string as_file_name(const std::string& name) {
  std::string plain;
  for (const char c : name.substr(0, 64)) plain += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '-';
  return plain;
}

// All of it, or no file.
void write_all(const Fd& file, const std::string& path, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::write(file.get(), text.data() + done, text.size() - done);
    if (n > 0) {
      done += static_cast<size_t>(n);
    } else if (errno != EINTR) {
      const int why = errno;
      unlink(path.c_str());
      errno = why;
      throw_errno("writing " + path + " failed");
    }
  }
}

}  // namespace

Tracer::Tracer(const Attachment& attachment, const Watch& watch) : a_(attachment), watch_(watch) {
  if (const char* folder = std::getenv("PYCOLL_TRACE"); folder != nullptr && *folder != '\0') {
    std::error_code none;  // a path that cannot be made absolute cannot be written to either, which is said then
    folder_ = std::filesystem::absolute(folder, none).string();
    if (none) folder_ = folder;
  }
  const Geometry& g = a_.geometry;
  say(LogLevel::kInfo, [&] {
    return "all ranks of " + a_.names.group + " are here: " + std::to_string(g.channels) + " channels, " +
           std::to_string(g.scratch_bytes() >> 10) + " KiB of scratch a rank";
  });
  say(LogLevel::kDebug, [&] {
    return a_.names.group + " has slots of " + std::to_string(g.slot_bytes) + " bytes, " +
           std::to_string(g.link_slots) + " link buffers of " + std::to_string(g.link_bytes) + ", one-shot to " +
           std::to_string(a_.one_shot_max_bytes) + " bytes, a channel for each " +
           std::to_string(a_.channel_min_bytes) + ", and a heap of " + std::to_string(g.heap_bytes >> 20) + " MiB";
  });
}

std::optional<Error> Tracer::failure_of(int rank) const {
  try {
    watch_.throw_failure_of(rank);
  } catch (const Error& e) {
    return e;
  }
  return std::nullopt;
}

const char* Tracer::state_of_rank(int rank) const {
  if (watch_.failed(rank)) return "failed";
  if (rank == a_.rank) return "here";
  const Watch::Fate fate = watch_.fate(rank);
  return fate == Watch::Fate::kDead ? "dead" : fate == Watch::Fate::kLeft ? "left" : "here";
}

std::string Tracer::trace() const {
  const int world = a_.geometry.world;
  const size_t most = std::clamp<size_t>(kMostEntries / world, 16, Journal::kEntries);
  std::vector<Seen> seen;
  for (int r = 0; r < world; ++r) seen.emplace_back(a_.control(r).journals, r == a_.rank ? Journal::kEntries : most);
  const Instant now = Instant::now();
  const Timebase time(a_.origin, now);
  timespec wall;
  clock_gettime(CLOCK_REALTIME, &wall);
  Json json;
  json.open('{').key("pycoll_trace").value(kFormat).key("communicator").value(a_.id).key("group").value(a_.names.group);
  json.key("rank").value(a_.rank).key("world_size").value(world);
  json.key("host").value(name_of_host()).key("pid").value(getpid());
  json.key("taken_ns").value(now.ns).key("unix_ns").value(int64_t{wall.tv_sec} * 1000000000 + wall.tv_nsec);
  write_error(json, failure_of(a_.rank));
  json.key("ranks").open('[');
  for (int r = 0; r < world; ++r) {
    const Control& c = a_.control(r);
    json.open('{').key("rank").value(r);
    if (!a_.names.global_ranks.empty()) json.key("global_rank").value(a_.names.global_ranks[r]);
    json.key("pid").value(static_cast<int>(c.pid)).key("state").value(state_of_rank(r));
    const int awaited = watch_.awaited_by(r, std::chrono::milliseconds::max());
    json.key("waits_for");
    awaited < 0 ? json.null() : json.value(awaited);
    write_error(json, failure_of(r));
    write_totals(json, c.journals, time);
    write_journals(json, seen[r], world, time);
    json.close('}');
  }
  return json.close(']').close('}').text() + "\n";
}

// Its path. What lies there already stays.
std::string Tracer::leave_file() const {
  const std::string text = trace();  // before anything else happens
  std::filesystem::create_directories(folder_);
  const std::string begin = (std::filesystem::path(folder_) / as_file_name(a_.names.group)).string() + "-rank" +
                            std::to_string(a_.rank) + "-" + std::to_string(getpid());
  for (int i = 1; i < 100; ++i) {
    std::string path = begin;
    if (i > 1) path.append("-").append(std::to_string(i));
    path.append(".json");
    const Fd file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (file) return write_all(file, path, text), path;
    if (errno != EEXIST) throw_errno("opening " + path + " failed");
  }
  throw Error(ErrorKind::kError, "pycoll: " + folder_ + " is full of traces of this process");
}

void Tracer::tell_failure(const Error& error) const noexcept try {
  std::string more;
  if (folder_.empty()) {
    more = "; PYCOLL_TRACE=FOLDER would keep what all ranks did last";
  } else {
    try {
      more = "; what all ranks did last: pycoll trace " + leave_file();
    } catch (const std::exception& e) {
      more = std::string("; what all ranks did last could not be kept: ") + e.what();
    }
  }
  // What somebody wanted, an abort or Ctrl-C, is no news.
  say(error.kind == ErrorKind::kError ? LogLevel::kInfo : LogLevel::kError,
      [&] { return a_.names.group + " has failed: " + name(error.kind) + ": " + error.what() + more; });
} catch (...) {  // no memory
}

void Tracer::tell_closed() const {
  say(LogLevel::kInfo, [&] { return a_.names.group + " is closed"; });
}

}  // namespace pycoll::cpu
