#include "core/loss_spike.h"

#include <algorithm>
#include <cmath>

#include "core/robust.h"

namespace safegrad {

std::optional<LossSpike> LossSpikeRule::add(double loss) {
  std::optional<LossSpike> spike;
  if (recent_.size() >= kWarmup) {
    const auto [m, deviation] = robust_spread({recent_.begin(), recent_.end()});
    const double limit = m + std::max(6 * deviation, 0.2 * std::abs(m));
    if (loss > limit) spike = LossSpike{m, limit, {}};
  }
  recent_.push_back(loss);
  if (recent_.size() > kWindow) recent_.pop_front();
  return spike;
}

}  // namespace safegrad
