// phase_clock.h: where the time of a step goes.
#pragma once
#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <string>

#include "core/backend.h"

namespace safegrad::dist {

enum class Phase {
  other,
  gather,
  forward,
  head,
  backward,
  reduce,
  surgery,
  optimizer,
  wait,
  count
};

/// Names as in metrics.jsonl, in the order of Phase.
inline constexpr std::array<const char*, static_cast<size_t>(Phase::count)> kPhaseNames = {
    "other", "gather", "forward", "head", "backward", "reduce", "surgery", "optimizer", "wait"};

/// Charges the device's time to one phase at a time: enter() ends the phase before.
class PhaseClock {
 public:
  explicit PhaseClock(const Backend& backend)
      : stopwatch_(backend.make_stopwatch(kPhaseNames.size())) {}

  void enter(Phase phase) { stopwatch_->enter(static_cast<size_t>(phase)); }
  /// Seconds by phase since the last take(), which starts over. A GPU that still works on the last
  /// phases has them in the next.
  std::map<std::string, double> take() {
    enter(Phase::other);
    const auto seconds = stopwatch_->take();
    std::map<std::string, double> result;
    for (size_t p = 0; p < seconds.size(); ++p) result[kPhaseNames[p]] = seconds[p];
    return result;
  }

 private:
  std::unique_ptr<Stopwatch> stopwatch_;
};

}  // namespace safegrad::dist
