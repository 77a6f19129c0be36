#include "dist/watchdog.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include "core/error.h"
#include "core/files.h"
#include "dist/flight_report.h"

namespace safegrad::dist {
namespace {

using namespace std::chrono_literals;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr milliseconds kTick = 200ms;
// From the last moment to leave a record to the end of the ranks that do not write the report.
constexpr milliseconds kReport = 5s;
// Should the file system hang as well, the process ends by SIGALRM.
constexpr unsigned kLastResort_s = 120;
constexpr int64_t kMaxLogBytes = 1 << 20;

// Between two looks for the folder. All ranks look, for the whole run: the more, the more rarely.
milliseconds look_interval(const Guard& what) {
  return std::min<milliseconds>(5s + what.ranks * 5ms,
                                std::max<milliseconds>(what.deadline / 2, 1s));
}

// From this rank's record to the report: every rank has looked by then.
milliseconds gather_time(const Guard& what) {
  return look_interval(what) + 10s;
}

// Opening a folder asks a network file system for what is new; looking for a name in it may be
// answered from a cache.
std::set<std::string> list(const std::string& folder) {
  std::set<std::string> names;
  std::error_code failed;
  std::filesystem::directory_iterator entries(folder, failed);
  for (; !failed && entries != std::filesystem::directory_iterator(); entries.increment(failed))
    names.insert(entries->path().filename().string());
  return names;
}

std::string log_path(const std::string& folder, int rank) {
  return fmt::format("{}/rank-{}.json", folder, rank);
}

std::vector<int> list_ranks(const Guard& what) {
  const std::set<std::string> names = list(what.folder);
  std::vector<int> ranks;
  for (int rank = 0; rank < what.ranks; ++rank) {
    if (names.contains(fmt::format("rank-{}.json", rank))) ranks.push_back(rank);
  }
  return ranks;
}

std::vector<FlightLog> read_logs(const Guard& what, const std::vector<int>& ranks) {
  std::vector<FlightLog> logs;
  for (const int rank : ranks) {
    const std::string path = log_path(what.folder, rank);
    try {
      logs.push_back(parse_flight_log(read_small_file(path, kMaxLogBytes), path));
    } catch (const std::exception&) {
      // Counts as silent: the report names it.
    }
  }
  return logs;
}

std::string explain_deadline(const Guard& what) {
  return fmt::format("no progress for {:g} s ({})",
                     std::chrono::duration<double>(what.deadline).count(), what.deadline_name);
}

void tell(const std::string& text) {
  fmt::print(stderr, "error: {}\n", text);
  std::fflush(stderr);
}

// A thread that calls `look` every tick, until it is true or this object goes. `passed` is this
// process's own time since the last look, at most two ticks of it: after a stop of the process it
// knows nothing of what others did meanwhile.
class Ticks {
 public:
  explicit Ticks(std::function<bool(milliseconds passed)> look)
      : look_(std::move(look)), thread_([this] { run(); }) {}

  ~Ticks() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

 private:
  void run() {
    Clock::time_point last = Clock::now();
    while (!sleep()) {
      const Clock::time_point now = Clock::now();
      if (look_(std::min(std::chrono::duration_cast<milliseconds>(now - last), 2 * kTick))) return;
      last = now;
    }
  }

  // True when stopped.
  bool sleep() {
    std::unique_lock lock(mutex_);
    return wake_.wait_for(lock, kTick, [&] { return stopped_; });
  }

  const std::function<bool(milliseconds)> look_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace

// Its thread touches no file: where a file system hangs, it is the one that still can speak. Nor
// does it leave a flight record there: which file is known.
class Watchdog::DiskWatch {
 public:
  DiskWatch(const std::vector<const Heartbeat*>& hearts, const std::function<void()>& end_job,
            const Guard& what)
      : end_job_(end_job),
        what_(what),
        hearts_(hearts.begin(), hearts.end()),
        ticks_([this](milliseconds passed) { return tick(passed); }) {}

 private:
  struct Heart {
    explicit Heart(const Heartbeat* beats) : heart(beats) {}
    const Heartbeat* heart;
    Heartbeat::Now seen;
    milliseconds still{0};
  };

  bool tick(milliseconds passed) {
    for (Heart& h : hearts_) {
      Heartbeat::Now now = h.heart->now();
      h.still = now.beats == h.seen.beats ? h.still + passed : milliseconds(0);
      h.seen = std::move(now);
      if (h.seen.what.empty() || h.still <= what_.deadline) continue;
      alarm(kLastResort_s);
      tell(explain(h.seen.what));
      end_job_();
      alarm(0);
      return true;
    }
    return false;
  }

  std::string explain(const std::string& doing) const {
    const std::string place =
        what_.places.empty()
            ? ""
            : fmt::format(" ({})", what_.places.at(static_cast<size_t>(what_.rank)));
    return fmt::format(
        "{}: rank {}{} is still {}: the disk or file system does not answer; look there first. "
        "Checkpoints that are complete stay so: --resume auto goes on from the newest",
        explain_deadline(what_), what_.rank, place, doing);
  }

  const std::function<void()>& end_job_;
  const Guard what_;
  std::vector<Heart> hearts_;
  Ticks ticks_;  // last: it uses the others
};

class Watchdog::Watch {
 public:
  Watch(const FlightRecord& record, Heartbeat& looks, const std::function<void()>& end_job,
        const Guard& what)
      : record_(record),
        looks_(looks),
        end_job_(end_job),
        what_(what),
        ticks_([this](milliseconds passed) { return tick(passed); }) {}

 private:
  bool tick(milliseconds passed) {
    if (!look(passed) && !others_are_late()) return false;
    alarm(kLastResort_s);
    report();
    end_job_();
    alarm(0);
    return true;
  }

  bool look(milliseconds passed) {
    const FlightRecord::Now now = record_.now();
    const bool same = now.last == seen_.last && now.awaited == seen_.awaited;
    still_ = same ? still_ + passed : milliseconds(0);
    since_look_ += passed;
    seen_ = now;
    return now.awaited && still_ > what_.deadline;
  }

  bool others_are_late() {
    if (what_.folder.empty() || since_look_ < look_interval(what_)) return false;
    since_look_ = milliseconds(0);
    const std::filesystem::path folder = what_.folder, parent = folder.parent_path();
    looks_.beat(fmt::format("looking into {}", parent.parent_path().string()));
    const bool late = list(parent.parent_path()).contains(parent.filename()) &&
                      list(parent).contains(folder.filename());
    looks_.rest();
    return late;
  }

  void report() {
    const FlightLog own = log();
    if (what_.folder.empty()) {
      tell(explain_alone(own));
      std::this_thread::sleep_for(1s);  // others tell theirs: the first end is everybody's
      return;
    }
    try {
      std::filesystem::create_directories(what_.folder);
      write_file_atomically(log_path(what_.folder, what_.rank), to_json(own));
    } catch (const std::exception& e) {
      return tell(fmt::format("{}\n  no flight record: {}", explain_alone(own), e.what()));
    }
    const std::vector<int> ranks = gather();
    if (ranks.empty() || ranks.front() == what_.rank) {
      const auto logs = read_logs(what_, ranks);
      speak(logs.empty() ? std::vector{own} : logs);
    } else {
      await_report();
    }
  }

  FlightLog log() const {
    FlightLog log;
    log.rank = what_.rank;
    log.ranks = what_.ranks;
    log.written =
        std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    log.flights = record_.recent();
    log.awaited = record_.now().awaited;
    log.groups = record_.last_of_groups();
    return log;
  }

  // The ranks that have left a record, once all have or the time is over; at once where another is
  // to speak.
  std::vector<int> gather() const {
    std::vector<int> ranks;
    const auto end = Clock::now() + gather_time(what_);
    do {
      std::this_thread::sleep_for(200ms);
      ranks = list_ranks(what_);
      if (!ranks.empty() && ranks.front() < what_.rank) return ranks;
    } while (static_cast<int>(ranks.size()) < what_.ranks && Clock::now() < end);
    return ranks;
  }

  // Two ranks may both take themselves for the lowest; the file is one's alone.
  void speak(std::vector<FlightLog> logs) const {
    const std::string path = what_.folder + "/report.txt";
    const int descriptor = open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (descriptor < 0 && errno == EEXIST) return await_report();
    const std::string text = fmt::format(
        "{}: {}\n  look there first; where ranks are only slow, give them more time\n  the last "
        "collectives of each rank are in {}",
        explain_deadline(what_), explain_standstill(std::move(logs), what_.places), what_.folder);
    tell(text);
    if (descriptor < 0) return;
    static_cast<void>(!write(descriptor, text.data(), text.size()));
    close(descriptor);
  }

  void await_report() const {
    const auto end = Clock::now() + gather_time(what_) + kReport;
    while (Clock::now() < end) {
      std::this_thread::sleep_for(200ms);
      if (!list(what_.folder).contains("report.txt")) continue;
      std::this_thread::sleep_for(500ms);  // until it is printed
      return;
    }
  }

  std::string explain_alone(const FlightLog& own) const {
    return fmt::format("rank {}: {}: {}", what_.rank, explain_deadline(what_), explain_rank(own));
  }

  const FlightRecord& record_;
  Heartbeat& looks_;
  const std::function<void()>& end_job_;
  const Guard what_;
  FlightRecord::Now seen_;
  milliseconds still_{0}, since_look_{0};
  Ticks ticks_;  // last: it uses the others
};

Watchdog::Watchdog(std::function<void()> end_job) : end_job_(std::move(end_job)) {}

Watchdog::~Watchdog() = default;

void Watchdog::guard(const Guard& what) {
  watch_.reset();
  disk_watch_ =
      std::make_unique<DiskWatch>(std::vector<const Heartbeat*>{&files_, &looks_}, end_job_, what);
  if (what.ranks > 1) watch_ = std::make_unique<Watch>(record_, looks_, end_job_, what);
}

std::string new_flight_folder(const std::string& parent) {
  return fmt::format("{}/{:%Y%m%dT%H%M%SZ}-{}", parent, fmt::gmtime(std::time(nullptr)), getpid());
}

}  // namespace safegrad::dist
