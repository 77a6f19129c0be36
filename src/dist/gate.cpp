#include "dist/gate.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

#include "core/robust.h"

namespace safegrad::dist {

Gate::Gate(double deviations, std::vector<int64_t> scored)
    : deviations_(deviations),
      scored_(std::move(scored)),
      scores_(scored_.size(), std::numeric_limits<double>::quiet_NaN()) {}

double Gate::threshold() const {
  constexpr double kNone = -std::numeric_limits<double>::infinity();
  std::vector<double> known;
  std::copy_if(scores_.begin(), scores_.end(), std::back_inserter(known),
               [](double score) { return std::isfinite(score); });
  if (std::ssize(known) < kFewest) return kNone;
  const RobustSpread spread = robust_spread(std::move(known));
  return spread.deviation > 0 ? spread.median - deviations_ * spread.deviation : kNone;
}

std::vector<int64_t> Gate::leave_out(const std::vector<int64_t>& drawn) const {
  auto score = [this](int64_t sample) { return scores_[static_cast<size_t>(sample)]; };
  std::vector<int64_t> out;
  std::copy_if(drawn.begin(), drawn.end(), std::back_inserter(out),
               [&, limit = threshold()](int64_t sample) { return score(sample) < limit; });
  if (!out.empty() && out.size() == drawn.size()) {
    const int64_t best = *std::max_element(
        out.begin(), out.end(), [&](int64_t a, int64_t b) { return score(a) < score(b); });
    std::erase(out, best);
  }
  std::sort(out.begin(), out.end());
  return out;
}

void Gate::take(const StepPlan& plan, const std::vector<double>& sums) {
  if (sums.empty()) return;
  const std::vector<std::vector<int64_t>> samples = samples_by_rank(plan, 0);
  const size_t slots = sums.size() / samples.size();
  for (size_t r = 0; r < samples.size(); ++r) {
    for (size_t i = 0; i < samples[r].size(); ++i) {
      const auto sample = static_cast<size_t>(samples[r][i]);
      const double score = sums[r * slots + i] / static_cast<double>(scored_[sample]);
      if (std::isfinite(score)) scores_[sample] = score;
    }
  }
}

int64_t score_slots(const StepPlan& plan) {
  size_t most = 0;
  for (const auto& samples : samples_by_rank(plan, 0)) most = std::max(most, samples.size());
  return static_cast<int64_t>(most);
}

}  // namespace safegrad::dist
