// phase_clock.h: where the time of a step goes.
#pragma once
#include <array>
#include <chrono>
#include <cstddef>

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

/// Charges wall time to one phase at a time: enter() ends the phase before.
class PhaseClock {
 public:
  void enter(Phase phase) {
    const auto now = std::chrono::steady_clock::now();
    seconds_[static_cast<size_t>(phase_)] += std::chrono::duration<double>(now - since_).count();
    since_ = now;
    phase_ = phase;
  }
  /// Seconds by phase since the last take(), which starts over.
  std::array<double, static_cast<size_t>(Phase::count)> take() {
    enter(Phase::other);
    const auto result = seconds_;
    seconds_.fill(0.0);
    return result;
  }

 private:
  std::array<double, static_cast<size_t>(Phase::count)> seconds_{};
  std::chrono::steady_clock::time_point since_ = std::chrono::steady_clock::now();
  Phase phase_ = Phase::other;
};

}  // namespace safegrad::dist
