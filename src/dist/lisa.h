// lisa.h: rule lisa (arXiv:2405.18641): whose turn a step is, and what pulls it back.
#pragma once
#include <cstdint>
#include <vector>

#include "core/config.h"
#include "core/metrics.h"
#include "core/planner.h"
#include "core/surgery.h"
#include "dist/engine.h"

namespace safegrad::dist {

/// Phases of alignment and of task steps take turns, each with the gradient of its own objective
/// and that of ρ/2 |w − w_anchor|², where w_anchor is the weights at the end of the phase before.
/// w − w_anchor stands in the place of the gradient of the objective that rests.
class Lisa {
 public:
  /// `config`: of rule lisa.
  Lisa(const RunConfig& config, int64_t total_steps);

  /// The objective whose gradient step `index` computes.
  size_t active(int64_t index) const { return task_.due(index) ? 0 : 1; }
  size_t resting(int64_t index) const { return 1 - active(index); }
  /// Step `index` uses the units' anchors, which an earlier step has set.
  bool needs_anchor(int64_t index) const;
  /// The anchor is in the units' shards: from a checkpoint.
  void hold_anchor() { anchored_ = true; }
  /// Before the passes of step `index`: where a phase begins, the weights become its anchor.
  void begin_step(Engine& engine, int64_t index);
  /// After them: w − w_anchor as the gradient of the objective that rests.
  void measure_drift(Engine& engine, int64_t index) const;
  /// 1 for the active objective; ρ for the drift, or 0 in the first tenth of the run.
  std::vector<double> coefficients(int64_t index) const;
  /// `gram`: of step `index`, the drift in the place of the gradient that was not computed. What
  /// that would have been is not measured: its loss and norm are NaN or left out.
  void describe(StepRecord& record, const Gram& gram, int64_t index) const;

 private:
  Turns task_;
  double rho_;
  int64_t total_steps_;
  bool anchored_ = false;  // the units' anchors are of the phase's start
};

}  // namespace safegrad::dist
