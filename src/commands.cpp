#include "commands.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "job.h"

namespace safegrad {

int check(const CommandLine& line, dist::Launcher& launcher) {
  const Job job = open_job(line, launcher, Purpose::check);
  const dist::ControlPlane& world = launcher.control();
  print_warnings(job.warnings, line, world);
  if (world.rank() == 0 && !line.quiet) {
    fmt::print("{}: valid for {} ranks; nothing was run\n", line.config,
               line.ranks > 0 ? line.ranks : world.size());
  }
  return 0;
}

int evaluate(const CommandLine& line, dist::Launcher& launcher) {
  Job job = open_job(line, launcher, Purpose::evaluate);
  print_warnings(job.warnings, line, launcher.control());
  dist::Mesh mesh(job.device->connect(), job.config.parallel.shards);
  const auto results =
      dist::evaluate_probes(job.config, *job.model.decoder, *job.model.weights, job.data, mesh);
  if (mesh.world().rank() == 0) fmt::print("{}\n", nlohmann::ordered_json(results).dump());
  return 0;
}

}  // namespace safegrad
