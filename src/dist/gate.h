// gate.h: which task samples a step leaves out: those that have worked most against alignment
// (objective.gate).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/planner.h"

namespace safegrad::dist {

/// A score for every task sample, from the last step that ran it:
///     s_i = u_i·a / |a|    u_i: ∇ of its cross-entropy, mean per response token, in that step
///                          a: the alignment gradient of the step before
/// A sample that is drawn again is left out while s_i < median − deviations · 1.4826 · median
/// absolute deviation, over all scores known. Pure: the same scores give the same decisions on
/// every rank.
class Gate {
 public:
  /// Fewer scores than these have no outliers.
  static constexpr int64_t kFewest = 32;

  /// `scored`: response tokens of every task sample.
  Gate(double deviations, std::vector<int64_t> scored);

  /// Scores below are outliers; −∞ while there are too few scores, or most of them are the same.
  double threshold() const;
  /// Of the task samples that a step draws, those it leaves out, ascending. Never all: the one
  /// with the highest score stays.
  std::vector<int64_t> leave_out(const std::vector<int64_t>& drawn) const;
  /// What the task sequences of a step were scored: `sums` [ranks, slots] as the ranks exchanged
  /// them, over a sequence's tokens, in the order of samples_by_rank; empty: none was. A number
  /// that is not finite is no score.
  void take(const StepPlan& plan, const std::vector<double>& sums);

  /// By sample; NaN: never scored.
  const std::vector<double>& scores() const { return scores_; }
  /// From a checkpoint.
  void set_scores(std::vector<double> scores) { scores_ = std::move(scores); }

 private:
  double deviations_;
  std::vector<int64_t> scored_;
  std::vector<double> scores_;
};

/// Most task sequences that a rank runs in the step: as many scores it sends.
int64_t score_slots(const StepPlan& plan);

}  // namespace safegrad::dist
