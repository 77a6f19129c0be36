// step_health.h: what a run makes of steps that went wrong: it warns, and gives up after too many.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/loss_spike.h"
#include "core/metrics.h"

namespace safegrad {

/// Looks at every step of a run in order. Gives up by what the ranks agreed on, so all do at once.
class StepHealth {
 public:
  /// `losses_before`: of the steps before, where a run goes on from a checkpoint. loss_spike
  /// depends on them, nothing else does, so the rank that writes records is the only one that needs
  /// them.
  StepHealth(const RunConfig& config, const std::vector<double>& losses_before);

  /// Adds loss_spike to a record that has one, with the samples that `draws` gives. Returns a line
  /// to warn with, or nothing.
  std::string look(StepRecord& record, const std::function<std::vector<int64_t>()>& draws);
  /// train.max_skipped_steps steps in a row were skipped.
  bool gives_up() const { return in_a_row_ >= config_.train.max_skipped_steps; }
  /// Why it gives up and what to do, as an error's text. `saved`: the checkpoint of the state after
  /// the last good step; empty: none.
  std::string report(const std::string& saved) const;

 private:
  const RunConfig config_;
  LossSpikeRule rule_;
  int64_t in_a_row_ = 0, last_step_ = 0;
  NotFinite what_;  // of all steps in this row
};

/// loss_task of the steps of a metrics file that were not skipped, in order, as many as a
/// LossSpikeRule looks at. Empty where there is no such file.
std::vector<double> read_losses(const std::string& metrics);

}  // namespace safegrad
