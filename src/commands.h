// commands.h: what the program does for each command; the one place that sees models and ranks
// together.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "dist/launcher.h"

namespace safegrad {

struct CommandLine {
  std::string config;                  ///< path of the YAML file
  std::vector<std::string> overrides;  ///< --set a.b=value
  bool quiet = false;                  ///< errors only
  int64_t ranks = 0;                   ///< check: for so many ranks; 0: for those that were started
  std::string resume;                  ///< train: "auto" or the folder of a checkpoint
  bool allow_change = false;           ///< train: resume although the run would be another
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

}  // namespace safegrad
