// watchdog.h: ends a job whose ranks no longer get on, and says which of them is behind, or whose
// disk does not answer.
#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dist/flight_record.h"
#include "dist/heartbeat.h"

namespace safegrad::dist {

/// What a watchdog guards.
struct Guard {
  int rank = 0, ranks = 1;
  std::chrono::milliseconds deadline{};  ///< > 0, of a collective, or of a disk
  std::string deadline_name;             ///< for messages: what the deadline is called
  /// Where ranks leave their records, the same and new on every rank; made when it is needed.
  /// Empty: ranks know nothing of each other, and each tells what it was in.
  std::string folder;
  std::vector<std::string> places = {};  ///< where each rank runs, for messages; may be empty
};

/// A thread that looks at this rank's flight record. When the rank has waited in one collective for
/// longer than the deadline, it leaves the record as rank-N.json in the folder; the other ranks
/// look for the folder every few seconds and leave theirs, computing or waiting. The lowest of them
/// prints what all records say (explain_standstill) and writes it to report.txt, and every rank
/// ends the job, also where the file system no longer answers. It does not communicate: the ranks'
/// network is what may have failed. Time in which the process itself was stopped does not count.
///
/// A second thread listens to files(): when a disk has not answered for the deadline, it says which
/// file this rank is at and ends the job. It touches no file, and asks nobody.
class Watchdog {
 public:
  /// `end_job` ends the process, from any thread, with an exit code that is not 0. Should it
  /// return, nothing is guarded any more.
  explicit Watchdog(std::function<void()> end_job);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  FlightRecord& record() { return record_; }
  Heartbeat& files() { return files_; }  ///< of the thread that writes checkpoints
  /// From now on. A single rank waits for no other: only its disk is guarded.
  void guard(const Guard& what);

 private:
  class Watch;
  class DiskWatch;
  FlightRecord record_;
  Heartbeat files_, looks_;  // looks_: of the watch itself, which reads a folder
  std::function<void()> end_job_;
  std::unique_ptr<DiskWatch> disk_watch_;  // before watch_, whose end may be what hangs
  std::unique_ptr<Watch> watch_;
};

/// A name that no other incident of this job has: UTC time and process. For rank 0 to broadcast.
std::string new_flight_folder(const std::string& parent);

}  // namespace safegrad::dist
