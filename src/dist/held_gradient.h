// held_gradient.h: which steps use the alignment gradient of an earlier one
// (objective.align_every).
#pragma once
#include <cstdint>
#include <optional>

#include "core/config.h"
#include "dist/step_scalars.h"

namespace safegrad::dist {

/// The alignment gradient that steps use again until it is renewed, and its loss, both sums over
/// `tokens` scored tokens; `aa` is the mean gradient's inner product with itself. The gradient
/// itself is in the units' shards.
struct HeldAlignment {
  double tokens = 0, loss = 0, aa = 0;
};

/// Steps 0, k, 2k, … compute the alignment gradient (objective.align_every: k), and step 1 where
/// that of step 0 is a KL's at the start model: zero up to rounding.
bool renews_alignment(const ObjectiveSection& objective, int64_t step);

/// Steps that do not renew the alignment gradient use the last one again. After a step that was not
/// finite there is none to use: the next step computes its own. Values are those that all ranks
/// share, so all ranks decide the same.
class HeldGradient {
 public:
  explicit HeldGradient(const ObjectiveSection& objective) : objective_(objective) {}

  /// What step `index` takes over; empty where it computes its own.
  std::optional<HeldAlignment> for_step(int64_t index) const;
  /// The last one, whether or not the next step computes its own.
  const std::optional<HeldAlignment>& last() const { return held_; }
  /// From a checkpoint.
  void hold(const HeldAlignment& held) { held_ = held; }
  /// After the exchange of step `index`: its alignment gradient, summed over `tokens`, is held if
  /// it is finite. Where the step did not compute it, its loss is set to the held one. `scalars`:
  /// inner products of means.
  void follow(int64_t index, double tokens, StepScalars& scalars);

 private:
  ObjectiveSection objective_;
  std::optional<HeldAlignment> held_;
};

}  // namespace safegrad::dist
