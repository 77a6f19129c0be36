// loss_spike.h: when a loss stands out from those before it, so that its samples can be looked at.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

namespace safegrad {

/// A loss that stood out, and what it was compared with.
struct LossSpike {
  double median = 0, limit = 0;
  std::vector<int64_t> samples;  ///< of the step's task draws; indexes of sequences in the file
};

/// Over the last kWindow losses, with median m and median absolute deviation d = median |x − m|:
/// a spike is a loss above the limit m + max(6 · 1.4826 d, 0.2 |m|). 1.4826 d estimates a standard
/// deviation that outliers, earlier spikes among them, do not move (Hampel 1974). The second term
/// keeps losses that hardly vary quiet. Nothing is a spike before kWarmup losses. Pure: the same
/// losses give the same spikes on every rank.
class LossSpikeRule {
 public:
  static constexpr size_t kWindow = 50, kWarmup = 20;

  /// Judges a loss by those before it, then remembers it. Not for losses of skipped steps.
  std::optional<LossSpike> add(double loss);

 private:
  std::deque<double> recent_;
};

}  // namespace safegrad
