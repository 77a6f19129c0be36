#include "dist/launcher.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <fmt/ranges.h>

#include "core/error.h"

namespace safegrad::dist {
namespace {

int64_t number_in(const Environment& environment, const char* name, int64_t low, int64_t high) {
  const std::string text = environment(name);
  int64_t value = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
  SAFEGRAD_CHECK(
      failed == std::errc() && end == text.data() + text.size() && value >= low && value <= high,
      InputError, "environment variable {}: got \"{}\"; allowed: {} to {}", name, text, low, high);
  return value;
}

StoreJob read_job(const Environment& environment, const char* rank, const char* size) {
  StoreJob job;
  job.size = static_cast<int>(number_in(environment, size, 1, 1 << 20));
  job.rank = static_cast<int>(number_in(environment, rank, 0, job.size - 1));
  job.host = environment("MASTER_ADDR");
  job.port = static_cast<uint16_t>(number_in(environment, "MASTER_PORT", 1, 65535));
  const char* agent = environment("TORCHELASTIC_USE_AGENT_STORE");
  job.hosted_by_agent = agent && std::strcmp(agent, "True") == 0;
  if (environment("TORCHELASTIC_RESTART_COUNT")) {
    job.attempt =
        static_cast<int>(number_in(environment, "TORCHELASTIC_RESTART_COUNT", 0, 1 << 20));
  }
  return job;
}

}  // namespace

std::optional<StoreJob> find_store_job(const Environment& environment) {
  auto is_set = [&](const char* name) { return environment(name) != nullptr; };
  if (is_set("OMPI_COMM_WORLD_SIZE") || is_set("PMIX_RANK") || is_set("PMI_RANK")) return {};
  const bool by_torchrun = is_set("RANK") || is_set("WORLD_SIZE");
  // Slurm describes the job in the batch script too, where one process runs; the step's size is
  // only in what srun starts.
  const bool in_step = is_set("SLURM_PROCID") && is_set("SLURM_STEP_NUM_TASKS");
  if (!by_torchrun && !in_step) return {};  // MASTER_ADDR alone says nothing about this process
  const auto names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"};
  std::vector<std::string> present, missing;
  for (const char* name : names) (is_set(name) ? present : missing).push_back(name);
  if (present.empty()) return {};
  if (missing.empty()) return read_job(environment, "RANK", "WORLD_SIZE");
  if (in_step && !is_set("RANK") && !is_set("WORLD_SIZE")) {
    if (missing.size() == 2) return read_job(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS");
    missing.erase(missing.begin(), missing.begin() + 2);
  }
  throw InputError(fmt::format(
      "the environment has {}, but not {}: ranks that torchrun starts need all of {}; under srun "
      "MASTER_ADDR and MASTER_PORT; under mpirun or srun --mpi=pmix none (unset them)",
      fmt::join(present, ", "), fmt::join(missing, ", "), fmt::join(names, ", ")));
}

void check_promised_ranks(int found, const Environment& environment, const std::string& remedy) {
  if (found > 1) return;
  for (const char* name :
       {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* value = environment(name);
    if (!value) continue;
    const int64_t promised = number_in(environment, name, 1, 1 << 30);
    SAFEGRAD_CHECK(promised <= 1, InputError,
                   "{} ranks were started ({}), but this one finds itself alone: they would each "
                   "train by themselves; {}",
                   promised, name, remedy);
    return;
  }
}

std::unique_ptr<Launcher> make_launcher(int* argc, char*** argv) {
  if (const auto job = find_store_job([](const char* name) { return std::getenv(name); }))
    return make_store_launcher(*job);
  return make_default_launcher(argc, argv);
}

}  // namespace safegrad::dist
