// commands.h: what the program does for each command; the one place that sees models and ranks
// together.
#pragma once
#include <string>
#include <vector>

#include "dist/launcher.h"

namespace safegrad {

struct CommandLine {
  std::string config;                  ///< path of the YAML file
  std::vector<std::string> overrides;  ///< --set a.b=value
  bool quiet = false;                  ///< errors only
};

/// Trains and writes the run folder. Every rank of the launcher's job calls it. Throws JobFailed
/// for what the ranks agreed on.
void train(const CommandLine& line, dist::Launcher& launcher);
/// Checks everything that train would refuse, reads headers only, writes nothing.
void check(const CommandLine& line, dist::Launcher& launcher);
/// Scores the config's model on its probes and prints one JSON line.
void evaluate(const CommandLine& line, dist::Launcher& launcher);

}  // namespace safegrad
