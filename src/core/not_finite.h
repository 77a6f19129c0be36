// not_finite.h: which parts of a step were NaN or infinite.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace safegrad {

/// What objectives are called in records, by their index.
inline constexpr const char* kObjectiveNames[] = {"task", "align"};

/// Why a step was skipped; the same on all ranks.
struct NotFinite {
  /// Objective -> ranks on whose samples its loss was not finite, ascending.
  std::map<std::string, std::vector<int>> losses;
  /// Block -> objectives whose reduced gradient is not finite in it; in the model's order. A loss
  /// that is not finite breaks the gradient of every block; a block that is named alone has
  /// overflowed in its own weight gradient.
  std::vector<std::pair<std::string, std::vector<std::string>>> blocks;
  /// Objective -> samples to look at: those of the ranks above, or where the loss was finite all of
  /// the step's; ascending indexes of sequences in the token file.
  std::map<std::string, std::vector<int64_t>> samples;

  /// Adds what another step has.
  void merge(const NotFinite& other);
};

/// "loss task on rank 1; gradients of embedding (task), block 0 (task, align) and 7 more".
std::string to_text(const NotFinite& what);

}  // namespace safegrad
