#include "verbose.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include "core/words.h"

namespace safegrad {
namespace {

namespace fs = std::filesystem;

double seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

std::string file_in_full(const std::string& label, const std::string& path) {
  std::error_code failed;  // it was opened; that it is gone by now is no reason to end a run
  const auto size = fs::file_size(path, failed);
  return fmt::format("{:<14}{}, {}\n", label, path,
                     failed ? failed.message() : size_in_words(static_cast<int64_t>(size)));
}

std::vector<std::string> weight_files(const std::string& folder) {
  std::vector<std::string> files;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(folder, failed)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

std::string ranks_in_full(dist::ControlPlane& control, const Backend& backend) {
  const std::string device = backend.device().str();
  const auto all = dist::all_gather_text(
      control, fmt::format("{}, {}{}, {}", process_in_words(), device,
                           device == backend.name() ? "" : fmt::format(" ({})", backend.name()),
                           counted(at::get_num_threads(), "thread")));
  std::string text;
  for (size_t r = 0; r < all.size(); ++r) text += fmt::format("rank {}: {}\n", r, all[r]);
  return text;
}

std::string files_in_full(const Job& job) {
  const RunConfig& c = job.config;
  std::string text;
  if (job.model.base_folder.empty()) text += file_in_full("model.config", c.model.config);
  if (job.model.from_adapter) {
    for (const auto& file : weight_files(c.model.path)) text += file_in_full("adapter", file);
  }
  if (!job.model.base_folder.empty()) {
    for (const auto& file : weight_files(job.model.base_folder))
      text += file_in_full("weights", file);
  }
  if (job.data.task) text += file_in_full("data.task", c.data.task);
  if (job.data.align) text += file_in_full("data.align", c.data.align);
  for (const ProbeConfig& probe : c.probe) text += file_in_full("probe", probe.file);
  return text;
}

void PartTimes::end(const std::string& part) {
  const auto now = Clock::now();
  parts_ += fmt::format("{}{} {:.2f} s", parts_.empty() ? "" : ", ", part, seconds(now - last_));
  last_ = now;
}

std::string PartTimes::text() const {
  return fmt::format("before the first step: {:.2f} s ({})\n", seconds(last_ - start_), parts_);
}

}  // namespace safegrad
