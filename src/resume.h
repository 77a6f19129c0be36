// resume.h: where a run starts: at its beginning, or at a checkpoint that fits it.
#pragma once
#include <string>
#include <vector>

#include "dist/checkpoint_files.h"
#include "dist/control_plane.h"

namespace safegrad {

/// The checkpoint that a run goes on from; no folder: it starts at its beginning.
struct StartPoint {
  std::string folder;
  dist::Manifest saved;

  bool resumes() const { return !folder.empty(); }
  /// True if it is one of this folder's.
  bool is_in(const std::string& checkpoints) const;
};

/// `resume` is what --resume says: "auto", the folder of a checkpoint, or nothing. The checkpoint
/// is verified, each of its files by one rank. Collective; JobFailed: damaged (with what is left);
/// no such checkpoint; without --resume, an output that has checkpoints; a checkpoint from
/// elsewhere for an output that has its own.
StartPoint find_start(const std::string& resume, const std::string& output,
                      dist::ControlPlane& world, std::vector<std::string>& warnings);

/// InputError that lists what differs between the run that wrote the checkpoint and this one; with
/// `allow_change` a warning each.
void check_unchanged(const StartPoint& start, const dist::Manifest& now, bool allow_change,
                     std::vector<std::string>& warnings);

/// Keeps the lines of a metrics file up to `step`: what came after will be measured again.
void cut_metrics(const std::string& path, int64_t step);

/// The last step that a metrics file has; 0 where there is none, or no such file.
int64_t last_recorded_step(const std::string& path);

}  // namespace safegrad
