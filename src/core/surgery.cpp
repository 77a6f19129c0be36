#include "core/surgery.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace safegrad {
namespace {

// CAGrad's inner problem: minimise F(w) = g_w·g0 + c |g0| |g_w| over g_w = w u + (1 - w) a, w in
// [0, 1]. F is convex, so a golden-section search finds it; 80 halvings reach the last bits of a
// double.
double cagrad_weight(double uu, double ua, double aa, double c) {
  const double g0_norm = std::sqrt(std::max(0.0, (uu + 2 * ua + aa) / 4));
  auto value = [&](double w) {
    const double along = 0.5 * (w * (uu + ua) + (1 - w) * (ua + aa));
    const double square = w * w * uu + 2 * w * (1 - w) * ua + (1 - w) * (1 - w) * aa;
    return along + c * g0_norm * std::sqrt(std::max(0.0, square));
  };
  const double golden = (std::sqrt(5.0) - 1) / 2;
  double low = 0, high = 1;
  double x1 = high - golden * (high - low), x2 = low + golden * (high - low);
  double f1 = value(x1), f2 = value(x2);
  for (int i = 0; i < 80; ++i) {
    if (f1 <= f2) {
      high = x2, x2 = x1, f2 = f1, x1 = high - golden * (high - low), f1 = value(x1);
    } else {
      low = x1, x1 = x2, f1 = f2, x2 = low + golden * (high - low), f2 = value(x2);
    }
  }
  return 0.5 * (low + high);
}

std::vector<double> cagrad(double uu, double ua, double aa, double c) {
  const double w = cagrad_weight(uu, ua, aa, c);
  const double g0_norm = std::sqrt(std::max(0.0, (uu + 2 * ua + aa) / 4));
  const double gw_norm =
      std::sqrt(std::max(0.0, w * w * uu + 2 * w * (1 - w) * ua + (1 - w) * (1 - w) * aa));
  const double lambda = gw_norm > 0 ? c * g0_norm / gw_norm : 0.0;
  return {0.5 + lambda * w, 0.5 + lambda * (1 - w)};
}

}  // namespace

bool Gram::finite() const {
  return std::all_of(values.begin(), values.end(), [](double v) { return std::isfinite(v); });
}

std::vector<double> combine(const Gram& gram, const RuleOptions& options) {
  if (gram.size == 1) return {1.0};
  SAFEGRAD_CHECK(gram.size == 2, UsageError, "combine: rules take 1 or 2 objectives, got {}",
                 gram.size);
  const double uu = gram.at(0, 0), ua = gram.at(0, 1), aa = gram.at(1, 1);
  const bool can_project = aa > kProjectionGuard;
  const double on_conflict = can_project ? -std::min(ua, 0.0) / aa : 0.0;
  switch (options.rule) {
    case Rule::sft:
      return {1, 0};
    case Rule::weighted_sum:
      return {1, options.rho};
    case Rule::safegrad:
      return {1, options.rho + on_conflict};
    case Rule::agem:
      return {1, on_conflict};
    case Rule::pcgrad:
      return {ua < 0 && uu > kProjectionGuard ? 1 - ua / uu : 1.0, 1 + on_conflict};
    case Rule::mgda: {
      const double spread = uu + aa - 2 * ua;  // |u - a|²
      const double gamma = spread > 0 ? std::clamp((aa - ua) / spread, 0.0, 1.0) : 0.5;
      return {gamma, 1 - gamma};
    }
    case Rule::cagrad:
      return cagrad(uu, ua, aa, options.cagrad_c);
    case Rule::ogpsa:
      return {1, can_project ? -ua / aa : 0.0};
    case Rule::lisa:
      break;
  }
  throw UsageError("combine: this rule is no function of inner products");
}

double combined_norm(const Gram& gram, const std::vector<double>& coefficients) {
  double square = 0;
  for (size_t i = 0; i < gram.size; ++i) {
    for (size_t j = 0; j < gram.size; ++j) {
      square += coefficients[i] * coefficients[j] * gram.at(i, j);
    }
  }
  return std::sqrt(std::max(0.0, square));
}

std::vector<std::vector<double>> combine_blocks(const std::vector<Gram>& blocks,
                                                const RuleOptions& options) {
  std::vector<std::vector<double>> coefficients;
  for (const Gram& gram : blocks) coefficients.push_back(combine(gram, options));
  return coefficients;
}

double combined_norm(const std::vector<Gram>& blocks,
                     const std::vector<std::vector<double>>& coefficients) {
  double square = 0;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const double norm = combined_norm(blocks[b], coefficients[b]);
    square += norm * norm;
  }
  return std::sqrt(square);
}

double cosine(const Gram& gram) {
  const double norms = std::sqrt(gram.at(0, 0)) * std::sqrt(gram.at(1, 1));
  return norms > 0 ? gram.at(0, 1) / norms : 0.0;
}

double clip_factor(double norm, double clip_norm) {
  return clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
}

}  // namespace safegrad
