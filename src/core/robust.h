// robust.h: middle and spread of numbers that outliers among them do not move (Hampel 1974).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace safegrad {

/// The mean of the two in the middle where their number is even. `values` is not empty.
inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

/// Median m, and 1.4826 · median |x − m|, which estimates a standard deviation.
struct RobustSpread {
  double median = 0, deviation = 0;
};
inline RobustSpread robust_spread(std::vector<double> values) {
  const double m = median(values);
  for (double& x : values) x = std::abs(x - m);
  return {m, 1.4826 * median(std::move(values))};
}

}  // namespace safegrad
