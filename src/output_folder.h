// output_folder.h: one run at a time writes to an output folder.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/file_lock.h"

namespace safegrad {

/// The output folder as rank 0 holds it until the run ends: locked through the file `lock` in it.
/// A second run throws InputError that names host, process and start of the first. Where the file
/// system has no locks a warning says so.
class OutputFolder {
 public:
  explicit OutputFolder(std::string path) : path_(std::move(path)) {}

  /// Locks the folder if it is there: before anything in it is read. Makes nothing else.
  void claim(std::vector<std::string>& warnings);
  /// Makes it, and locks it unless claim() has. InputError also if another run's checkpoints have
  /// appeared since claim() found no folder.
  void make(std::vector<std::string>& warnings);

 private:
  std::string path_;
  bool claimed_ = false;
  std::unique_ptr<FileLock> lock_;
};

}  // namespace safegrad
