#include "commands.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/words.h"
#include "describe.h"
#include "dist/local_rank.h"
#include "job.h"
#include "verbose.h"

namespace safegrad {

int check(const CommandLine& line, dist::Launcher& launcher) {
  const Job job = open_job(line, launcher, Purpose::check);
  dist::ControlPlane& world = launcher.control();
  const int64_t started = world.size();
  // Ranks that are not there are taken to share a machine as those do that are.
  const int64_t near =
      started > 1 ? dist::find_local_rank(world).ranks : std::max<int64_t>(1, line.ranks);
  print_warnings(job.warnings, line, world);
  if (world.rank() == 0 && !line.quiet) {
    const int64_t ranks = line.ranks > 0 ? line.ranks : started;
    fmt::print("{}: valid for {}; nothing was run\n{}", line.config, counted(ranks, "rank"),
               check_in_words(job, ranks, near));
    if (line.verbose) fmt::print("{}", files_in_full(job));
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
