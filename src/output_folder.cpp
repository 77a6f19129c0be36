#include "output_folder.h"

#include <filesystem>

#include <fmt/format.h>

#include "core/error.h"
#include "core/files.h"
#include "dist/checkpoint_files.h"

namespace safegrad {

void OutputFolder::claim(std::vector<std::string>& warnings) {
  if (claimed_ || !std::filesystem::is_directory(path_)) return;
  try {
    lock_ = FileLock::take(path_ + "/lock", fmt::format("output: {}", path_));
  } catch (const InputError& taken) {
    throw InputError(
        fmt::format("{}; wait for its end (one that has ended or was killed holds nothing), or "
                    "choose another folder with --set output=FOLDER",
                    taken.what()));
  }
  claimed_ = true;
  if (!lock_) {
    warnings.push_back(fmt::format(
        "output: the file system of {} has no locks: see to it that no other job writes there",
        path_));
  }
}

void OutputFolder::make(std::vector<std::string>& warnings) {
  if (claimed_) return;
  try {
    make_folders(path_);
  } catch (const RunError& error) {
    throw InputError(
        fmt::format("output: {}; choose another folder with --set output=FOLDER", error.what()));
  }
  claim(warnings);
  // The run of somebody who came first may have begun and ended since.
  SAFEGRAD_CHECK(dist::list_checkpoints(path_ + "/checkpoints").empty(), InputError,
                 "output: another job has just written checkpoints to {}; run again with --resume "
                 "auto to go on from them, or choose another folder with --set output=FOLDER",
                 path_);
}

}  // namespace safegrad
