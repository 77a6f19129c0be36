// schedule.h: the learning rate as a function of the step.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "core/config.h"

namespace safegrad {

/// Factor on the learning rate for 0-based `step` of `total`: linear warm-up over `warmup_steps`
/// (step 0 already moves), then constant, linear decay to 0, or a half cosine to 0; both decays end
/// after the last step, so every step moves.
inline double schedule_factor(const ScheduleSection& schedule, int64_t step, int64_t total) {
  if (step < schedule.warmup_steps) {
    return static_cast<double>(step + 1) / static_cast<double>(schedule.warmup_steps + 1);
  }
  const double remaining = static_cast<double>(total - step);
  const double span = static_cast<double>(std::max<int64_t>(1, total - schedule.warmup_steps));
  const double left = std::clamp(remaining / span, 0.0, 1.0);
  switch (schedule.kind) {
    case ScheduleKind::linear:
      return left;
    case ScheduleKind::cosine:
      return 0.5 * (1 - std::cos(std::numbers::pi * left));
    case ScheduleKind::constant:
      break;
  }
  return 1.0;
}

}  // namespace safegrad
