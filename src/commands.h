// commands.h: what the program does for each command; the one place that sees models and ranks
// together.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dist/launcher.h"

namespace safegrad {

/// What `plan` is asked for.
struct PlanOptions {
  std::vector<int64_t> ranks;  ///< each is planned by itself
  std::string device;          ///< a name of core/hardware.h; empty: as parallel.device says
  std::string network;         ///< between machines, in place of the device's
  int64_t ranks_per_node = 0;  ///< 0: the device's
  std::string figures;         ///< a YAML file laid over the table
  int64_t tokens = 0;          ///< of every sequence, in place of the data files; 0: the files
  int64_t scored = 0;          ///< of those; 0: all but the first
  bool run = false;            ///< run one rank here and compare
  bool json = false;
};

struct CommandLine {
  std::string config;                  ///< path of the YAML file
  std::vector<std::string> overrides;  ///< --set a.b=value
  bool quiet = false;                  ///< errors only
  bool verbose = false;                ///< train, check: also ranks, files and times
  int64_t ranks = 0;                   ///< check: for so many ranks; 0: for those that were started
  std::string resume;                  ///< train: "auto" or the folder of a checkpoint
  bool allow_change = false;           ///< train: resume although the run would be another
  int64_t top = 20;                    ///< audit: samples to print
  int64_t steps = 10;                  ///< audit: plain steps before it
  PlanOptions plan;
};

/// Exit code of a run that was asked to stop (SIGINT, SIGTERM, SIGUSR1), has written a checkpoint
/// and can go on: EX_TEMPFAIL of sysexits.h.
inline constexpr int kStoppedOnRequest = 75;

// Every rank of the launcher's job calls them. They return the exit code, and throw JobFailed for
// what the ranks agreed on.

/// Trains and writes the run folder. Returns 0, or on rank 0 kStoppedOnRequest.
int train(const CommandLine& line, dist::Launcher& launcher);
/// Checks everything that train would refuse, reads headers only, writes nothing.
int check(const CommandLine& line, dist::Launcher& launcher);
/// Scores the config's model on its probes and prints one JSON line.
int evaluate(const CommandLine& line, dist::Launcher& launcher);

/// Ranks the task samples by how much each one's gradient works against the alignment set's
/// (dist/audit.h); prints the worst and writes all to output/audit.jsonl.
int audit(const CommandLine& line, dist::Launcher& launcher);

/// Prints what the config's run would take on other numbers of ranks and another device. Runs
/// nothing, reads no weights; with `run`, trains a step of one rank and throws RunError where it
/// took other memory or traffic. One process.
int plan(const CommandLine& line, dist::Launcher& launcher);

}  // namespace safegrad
