// pack.h: turns the draws of one rank and micro-batch into one packed batch.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "core/backend.h"
#include "core/packed_batch.h"
#include "core/planner.h"
#include "core/token_file.h"

namespace safegrad {

/// One objective's data and how it is scored.
struct ObjectiveData {
  const TokenFile* file = nullptr;
  bool all_positions =
      false;  ///< score every position (the authors' KL), not only those before response tokens
  /// Reference hidden states [rows, D] of a sample's scored rows; empty unless the objective is a
  /// KL.
  std::function<at::Tensor(int64_t sample)> reference;
};

struct PackOptions {
  bool dropout = false;
  uint64_t seed = 0;  ///< with `step`, the sample and the layer: the key of every dropout draw
  int64_t step = 0;
};

/// Rows that are scored in sample `i` of the objective.
int64_t scored_rows(const ObjectiveData& data, int64_t i);

/// `draws` are sorted by objective. The batch has as many objectives as `objectives`, empty ones
/// where nothing was drawn. Throws UsageError if draws are not sorted or name another objective.
PackedBatch pack(const std::vector<Draw>& draws, const std::vector<ObjectiveData>& objectives,
                 const PackOptions& options);

/// The lengths alone of what pack would make: no tensors. `streams` by objective; of the draws
/// those whose objective is in `active` count.
PackedBatch outline(const std::vector<Draw>& draws, const std::vector<Stream>& streams,
                    const std::vector<size_t>& active);

/// The batch with its tensors on the backend's device; copies are enqueued.
PackedBatch upload(PackedBatch batch, const Backend& backend);

/// Choice groups for a probe, prompts shared: a group's prompt is one sequence, and each candidate
/// of more than one token continues it. Scored rows are listed candidate by candidate (the prompt's
/// last row repeats): `candidates[i]` is the sequence of the file that row i belongs to. One
/// objective.
struct PackedChoices {
  PackedBatch batch;
  std::vector<int64_t> candidates;
};
PackedChoices pack_choices(const std::vector<int64_t>& groups, const TokenFile& file,
                           const std::vector<std::vector<int64_t>>& members);

/// Tokens that each choice group takes in a batch: its prompt once, and each candidate but its last
/// token.
std::vector<int64_t> group_lengths(const TokenFile& file);

}  // namespace safegrad
