#include "resume.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"

namespace safegrad {
namespace {

namespace fs = std::filesystem;

std::string choose_folder(std::string resume, const std::string& own,
                          std::vector<std::string>& warnings) {
  while (resume.size() > 1 && resume.back() == '/') resume.pop_back();  // as shells complete it
  const std::vector<int64_t> steps = dist::list_checkpoints(own);
  if (resume.empty()) {
    SAFEGRAD_CHECK(steps.empty(), InputError,
                   "{} has checkpoints, the newest after step {}: --resume auto goes on from it; a "
                   "new run takes another folder, --set output=FOLDER",
                   own, steps.back());
    return "";
  }
  if (resume == "auto") return dist::find_latest(own, warnings).value_or("");
  SAFEGRAD_CHECK(fs::is_directory(resume), InputError,
                 "--resume {}: there is no such folder; allowed: auto, or the folder of a "
                 "checkpoint such as {}/step-000100",
                 resume, own);
  SAFEGRAD_CHECK(
      !fs::exists(resume + "/metrics.jsonl") || fs::exists(resume + "/manifest.json"), InputError,
      "--resume {}: this is a run's folder; allowed: auto, or the folder of a checkpoint "
      "such as {}/checkpoints/step-000100",
      resume, resume);
  SAFEGRAD_CHECK(!dist::is_unfinished(resume), InputError,
                 "--resume {}: this is what a crash left behind, and not complete; --resume auto "
                 "takes the newest complete checkpoint of {}",
                 resume, own);
  // Steps of two runs side by side in one folder could not be told apart later.
  const fs::path parent = fs::weakly_canonical(resume).parent_path();
  SAFEGRAD_CHECK(steps.empty() || parent == fs::weakly_canonical(own), InputError,
                 "--resume {}: {} has checkpoints of its own; to go on from another run's take "
                 "another folder, --set output=FOLDER",
                 resume, own);
  return resume;
}

// Of a line of metrics; nothing where it is no step's.
std::optional<int64_t> step_of(const std::string& line) {
  const auto json = nlohmann::json::parse(line, nullptr, false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) return {};
  return json["step"].get<int64_t>();
}

}  // namespace

StartPoint find_start(const std::string& resume, const std::string& output,
                      dist::ControlPlane& world, std::vector<std::string>& warnings) {
  StartPoint start;
  dist::agree(world, [&] {
    if (world.rank() == 0) start.folder = choose_folder(resume, output + "/checkpoints", warnings);
  });
  start.folder = world.broadcast(start.folder, 0);
  if (!start.resumes()) return start;
  dist::agree_patiently(world, [&] {
    start.saved = dist::verify_checkpoint(start.folder, world.rank(), world.size());
  });
  return start;
}

void check_unchanged(const StartPoint& start, const dist::Manifest& now, bool allow_change,
                     std::vector<std::string>& warnings) {
  const std::vector<std::string> lines = dist::differences(start.saved, now);
  SAFEGRAD_CHECK(lines.empty() || allow_change, InputError,
                 "{} is of another run: {}; set them back, or give --allow-change to go on with "
                 "what is given now",
                 start.folder, fmt::join(lines, "; "));
  for (const std::string& line : lines)
    warnings.push_back(fmt::format("changed since {}: {}", start.folder, line));
}

void cut_metrics(const std::string& path, int64_t step) {
  if (!fs::exists(path)) return;
  std::ifstream lines(path, std::ios::binary);
  SAFEGRAD_CHECK(lines.is_open(), RunError, "{}: cannot be read; is it yours?", path);
  AtomicFile kept(path);
  for (std::string line; std::getline(lines, line);) {
    // A crash may have cut a line short: then it is one of those that will be measured again.
    const std::optional<int64_t> number = step_of(line);
    if (!number || *number > step) continue;
    kept.write(std::as_bytes(std::span(line)));
    kept.write(std::as_bytes(std::span("\n", 1)));
  }
  SAFEGRAD_CHECK(!lines.bad(), RunError, "{}: reading it failed; it is left as it was", path);
  kept.commit();
}

int64_t last_recorded_step(const std::string& path) {
  int64_t last = 0;
  std::ifstream lines(path, std::ios::binary);
  for (std::string line; std::getline(lines, line);)
    last = std::max(last, step_of(line).value_or(0));
  return last;
}

bool StartPoint::is_in(const std::string& checkpoints) const {
  return resumes() &&
         fs::weakly_canonical(folder).parent_path() == fs::weakly_canonical(checkpoints);
}

}  // namespace safegrad
