#include "dist/watchdog.h"

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <mutex>
#include <optional>
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
// A rank that has been in the same place for this long, or for half a deadline, looks for other
// ranks' trouble; a healthy one never asks the file system.
constexpr milliseconds kQuiet = 10s;
constexpr milliseconds kLook = 1s;
// From the first record in the folder to the report; a rank looks once a second.
constexpr milliseconds kGather = 4s;
// From the report being due to the end of those that do not write it.
constexpr milliseconds kReport = 3s;
constexpr int64_t kMaxLogBytes = 1 << 20;

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

std::string log_path(const std::string& folder, int rank) {
  return fmt::format("{}/rank-{}.json", folder, rank);
}

std::vector<FlightLog> read_logs(const Guard& what) {
  std::vector<FlightLog> logs;
  for (int rank = 0; rank < what.ranks; ++rank) {
    const std::string path = log_path(what.folder, rank);
    try {
      if (std::filesystem::exists(path))
        logs.push_back(parse_flight_log(read_small_file(path, kMaxLogBytes), path));
    } catch (const std::exception&) {
      // Counts as silent: the report names it.
    }
  }
  return logs;
}

}  // namespace

class Watchdog::Watch {
 public:
  Watch(const FlightRecord& record, const std::function<void()>& end_job, Guard what)
      : record_(record), end_job_(end_job), what_(std::move(what)), thread_([this] { run(); }) {}

  ~Watch() {
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
    while (!sleep(kTick)) {
      const Clock::time_point now = Clock::now();
      const bool late =
          look(std::min(std::chrono::duration_cast<milliseconds>(now - last), 2 * kTick));
      last = now;
      if (late || others_are_late()) {
        report();
        return end_job_();
      }
    }
  }

  // True when stopped.
  bool sleep(milliseconds time) {
    std::unique_lock lock(mutex_);
    return wake_.wait_for(lock, time, [&] { return stopped_; });
  }

  // `passed` is this process's own time since the last look, at most two ticks of it: after a stop
  // of the process it knows nothing of what the others did meanwhile.
  bool look(milliseconds passed) {
    const FlightRecord::Now now = record_.now();
    const bool same = now.last == seen_.last && now.awaited == seen_.awaited;
    still_ = same ? still_ + passed : milliseconds(0);
    since_look_ += passed;
    seen_ = now;
    return now.awaited && still_ > what_.deadline;
  }

  bool others_are_late() {
    if (what_.folder.empty() || still_ < std::min(kQuiet, what_.deadline / 2) ||
        since_look_ < kLook)
      return false;
    since_look_ = milliseconds(0);
    std::error_code failed;
    return std::filesystem::exists(what_.folder, failed);
  }

  void report() {
    const FlightLog own = log();
    if (what_.folder.empty()) return tell(explain_alone(own));
    try {
      std::filesystem::create_directories(what_.folder);
      write_file_atomically(log_path(what_.folder, what_.rank), to_json(own));
    } catch (const std::exception& e) {
      return tell(fmt::format("{}\n  no flight record: {}", explain_alone(own), e.what()));
    }
    const auto logs = gather();
    const int lowest = logs.empty() ? what_.rank : logs.front().rank;
    if (lowest == what_.rank) {
      speak(logs.empty() ? std::vector{own} : logs);
    } else {
      await_report();
    }
  }

  FlightLog log() const {
    FlightLog log;
    log.rank = what_.rank;
    log.ranks = what_.ranks;
    log.host = host_name();
    log.pid = getpid();
    log.written =
        std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    log.flights = record_.recent();
    log.awaited = record_.now().awaited;
    return log;
  }

  std::vector<FlightLog> gather() const {
    std::vector<FlightLog> logs;
    const auto end = Clock::now() + kGather;
    do {
      std::this_thread::sleep_for(100ms);
      logs = read_logs(what_);
    } while (static_cast<int>(logs.size()) < what_.ranks && Clock::now() < end);
    return logs;
  }

  // Two ranks may both take themselves for the lowest; the file is one's alone.
  void speak(std::vector<FlightLog> logs) const {
    const std::string path = what_.folder + "/report.txt";
    const int descriptor = open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (descriptor < 0 && errno == EEXIST) return await_report();
    const std::string text =
        fmt::format("{}: {}\n  the last collectives of each rank are in {}", explain_deadline(),
                    explain_standstill(std::move(logs)), what_.folder);
    tell(text);
    if (descriptor < 0) return;
    static_cast<void>(!write(descriptor, text.data(), text.size()));
    close(descriptor);
  }

  void await_report() const {
    std::error_code failed;
    const std::string path = what_.folder + "/report.txt";
    for (const auto end = Clock::now() + kReport; Clock::now() < end;) {
      if (std::filesystem::exists(path, failed) && std::filesystem::file_size(path, failed) > 0)
        return;
      std::this_thread::sleep_for(50ms);
    }
  }

  std::string explain_deadline() const {
    return fmt::format("no progress for {:g} s ({})",
                       std::chrono::duration<double>(what_.deadline).count(), what_.deadline_name);
  }

  std::string explain_alone(const FlightLog& own) const {
    return fmt::format("rank {}: {}: {}", what_.rank, explain_deadline(), explain_rank(own));
  }

  static void tell(const std::string& text) {
    fmt::print(stderr, "error: {}\n", text);
    std::fflush(stderr);
  }

  const FlightRecord& record_;
  const std::function<void()>& end_job_;
  const Guard what_;
  FlightRecord::Now seen_;
  milliseconds still_{0}, since_look_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopped_ = false;
  std::thread thread_;  // last: it uses the others
};

Watchdog::Watchdog(std::function<void()> end_job) : end_job_(std::move(end_job)) {}

Watchdog::~Watchdog() = default;

void Watchdog::guard(const Guard& what) {
  watch_.reset();
  if (what.ranks > 1) watch_ = std::make_unique<Watch>(record_, end_job_, what);
}

std::string new_flight_folder(const std::string& parent) {
  return fmt::format("{}/{:%Y%m%dT%H%M%SZ}-{}", parent, fmt::gmtime(std::time(nullptr)), getpid());
}

}  // namespace safegrad::dist
