// checkpoint_files.h: what a checkpoint is on disk: a folder that is complete or not there.
//
//   output/checkpoints/latest                       name of the newest folder; written last
//   output/checkpoints/step-000100/
//     shard-00000-of-00004.safetensors ...          see checkpoint.h
//     manifest.json                                 what the shards belong to
//     SHA256SUMS                                    of all the others, for `sha256sum -c`
//   output/checkpoints/step-000200.tmp/             being written, or left by a crash
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/config.h"

namespace safegrad::dist {

/// What a checkpoint says about itself besides weights and moments. Texts are compared on resume.
struct Manifest {
  int64_t step = 0;                           ///< finished steps; the data position follows from it
  int64_t updates = 0;                        ///< steps that were not skipped: AdamW's t
  int64_t ranks = 0, shards = 0;              ///< the layout that wrote it; `shards` files
  std::map<std::string, std::string> config;  ///< config_values() of the resolved config
  std::map<std::string, std::string> inputs;  ///< fingerprints of model and data, by what they are
  std::map<std::string, std::string> versions;
  /// Of the alignment gradient in the shards, where the next step uses it: its scored tokens, its
  /// loss as a sum over them, and the mean gradient's inner product with itself.
  struct Align {
    int64_t tokens = 0;
    double loss = 0, aa = 0;
  };
  std::optional<Align> align;
};

std::string to_json(const Manifest& manifest);
/// Throws InputError that begins with `where`: not JSON, a key missing, mistyped or out of range.
Manifest parse_manifest(const std::string& text, const std::string& where);

std::string checkpoint_name(int64_t step);              ///< "step-000100"
std::string shard_name(int64_t index, int64_t shards);  ///< "shard-00000-of-00004.safetensors"

/// Steps of the complete checkpoints in `folder` (output/checkpoints), ascending; empty if there is
/// no such folder.
std::vector<int64_t> list_checkpoints(const std::string& folder);
/// True for names that crashes leave behind: of a checkpoint that is not complete, or was on its
/// way out.
bool is_unfinished(const std::string& path);
/// Removes what crashes left half-written in `folder`. Throws RunError.
void remove_unfinished(const std::string& folder);

/// The checkpoint folder that `--resume auto` means: what `latest` names, else, with a warning, the
/// newest complete one; nothing where there is none.
std::optional<std::string> find_latest(const std::string& folder,
                                       std::vector<std::string>& warnings);

/// Reads manifest and checksums of a checkpoint folder and verifies the manifest's; then those of
/// the shards `part`, `part + parts`, ... So ranks share the work. Throws InputError: the file that
/// is missing or damaged, and which older checkpoint is left.
Manifest verify_checkpoint(const std::string& folder, int64_t part, int64_t parts);

/// A shard as the rank that wrote it meant it to be, not as a disk gave it back.
struct WrittenShard {
  std::string digest;
  int64_t bytes = 0;
};

/// Turns `folder`/step-N.tmp, in which shards[i] is shard i, into `folder`/step-N: manifest,
/// checksums, rename, `latest`; each on the disk before the next. Throws RunError, also where this
/// rank does not see a shard at its size.
void seal_checkpoint(const std::string& folder, const Manifest& manifest,
                     const std::vector<WrittenShard>& shards);
/// Makes the checkpoint after `step` the one that `--resume auto` means. Throws RunError.
void name_latest(const std::string& folder, int64_t step);
/// Removes checkpoints of `folder` older than the `keep_last` newest, but not the multiples of
/// keep_every. `since` and `step`: the run's last two checkpoints, or where it went on from and its
/// first one; those between them and after `step`, which a run that was resumed further back has
/// left behind, go in any case.
void prune_checkpoints(const std::string& folder, int64_t since, int64_t step,
                       const CheckpointSection& keep);

/// One line per difference between what a checkpoint was written by and the run that would go on
/// from it, in what `now` knows of. Keys that change where and how, but not what is computed, may
/// differ; a key that `saved` does not have had its default.
std::vector<std::string> differences(const Manifest& saved, const Manifest& now);

}  // namespace safegrad::dist
