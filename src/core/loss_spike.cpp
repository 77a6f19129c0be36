#include "core/loss_spike.h"

#include <algorithm>
#include <cmath>

namespace safegrad {
namespace {

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

}  // namespace

std::optional<LossSpike> LossSpikeRule::add(double loss) {
  std::optional<LossSpike> spike;
  if (recent_.size() >= kWarmup) {
    const double m = median({recent_.begin(), recent_.end()});
    std::vector<double> deviations;
    for (const double x : recent_) deviations.push_back(std::abs(x - m));
    const double limit = m + std::max(6 * 1.4826 * median(deviations), 0.2 * std::abs(m));
    if (loss > limit) spike = LossSpike{m, limit, {}};
  }
  recent_.push_back(loss);
  if (recent_.size() > kWindow) recent_.pop_front();
  return spike;
}

}  // namespace safegrad
