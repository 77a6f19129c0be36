// loss_math.h: softmax losses of one row of logits from running statistics: one sweep for the loss,
// one for the gradient (online softmax: Milakov & Gimelshein, arXiv:1805.02867).
#pragma once
#include <cmath>

#include "core/vector_math.h"

namespace safegrad {

/// Where a running maximum starts: finite, so that the difference of two starts is 0, not NaN.
inline constexpr float kLowestLogit = -3.402823466e38f;

/// Larger of two; a NaN in `x` is passed over, and enters the sums instead.
SAFEGRAD_HOST_DEVICE inline float larger(float top, float x) {
  return x > top ? x : top;
}

/// Statistics of part of a row: max x and Σ e^(x − max). They grow by N elements at a time, and
/// parts merge; the order decides the last digit. Aggregates without initialisers, for a GPU's
/// shared memory; start from none(). Fused multiply-adds are explicit, so that the sums of equal
/// numbers are equal however a compiler fuses.
struct SoftmaxSums {
  float top, sum;

  SAFEGRAD_HOST_DEVICE static SoftmaxSums none() { return {kLowestLogit, 0.0f}; }

  template <int N>
  SAFEGRAD_HOST_DEVICE void add(const float (&x)[N]) {
    float highest = top, added = 0.0f;
    for (int i = 0; i < N; ++i) highest = larger(highest, x[i]);
    for (int i = 0; i < N; ++i) added += exp_f32(x[i] - highest);
    sum = std::fma(sum, exp_f32(top - highest), added);
    top = highest;
  }

  SAFEGRAD_HOST_DEVICE void merge(const SoftmaxSums& other) {
    const float highest = larger(top, other.top);
    const float others = other.sum * exp_f32(other.top - highest);
    sum = std::fma(sum, exp_f32(top - highest), others);
    top = highest;
  }
};

/// −log softmax(x)[target] = log Σ e^(x − top) + top − x_target.
SAFEGRAD_HOST_DEVICE inline double cross_entropy_loss(double sum, float top, float target_logit) {
  return std::log(sum) + static_cast<double>(top) - static_cast<double>(target_logit);
}

/// Statistics of part of a row of logits x and of the reference's logits r. With d = r − x:
///   KL(p_r ‖ p) = Σ p_r d − lse(r) + lse(x)
/// d is taken relative to the difference of the maxima, so that what is summed is small when the
/// models are close, and a KL near zero keeps its digits. For equal logits both sides go through
/// the same operations: both sums are equal and `weighted` is 0, bit for bit.
struct KlSums {
  SoftmaxSums model, reference;
  float weighted;  ///< Σ e^(r − reference.top) ((r − x) − gap())

  SAFEGRAD_HOST_DEVICE static KlSums none() {
    return {SoftmaxSums::none(), SoftmaxSums::none(), 0.0f};
  }
  SAFEGRAD_HOST_DEVICE float gap() const { return reference.top - model.top; }

  template <int N>
  SAFEGRAD_HOST_DEVICE void add(const float (&x)[N], const float (&r)[N]) {
    const KlSums before = *this;
    model.add(x);
    reference.add(r);
    float added = 0.0f;
    for (int i = 0; i < N; ++i) added += exp_f32(r[i] - reference.top) * ((r[i] - x[i]) - gap());
    weighted = before.weighted_under(*this) + added;
  }

  SAFEGRAD_HOST_DEVICE void merge(const KlSums& other) {
    const KlSums before = *this;
    model.merge(other.model);
    reference.merge(other.reference);
    weighted = before.weighted_under(*this) + other.weighted_under(*this);
  }

 private:
  /// `weighted` as it is relative to the maxima of `whole`.
  SAFEGRAD_HOST_DEVICE float weighted_under(const KlSums& whole) const {
    const float moved = weighted + reference.sum * (gap() - whole.gap());
    return moved * exp_f32(reference.top - whole.reference.top);
  }
};

SAFEGRAD_HOST_DEVICE inline double kl_loss(double sum, double reference_sum, double weighted) {
  return weighted / reference_sum + std::log(sum / reference_sum);
}

/// p − p_r from e = e^(x − top) and e_r = e^(r − reference_top); ratio = reference_sum / sum, scale
/// = 1 / reference_sum. Scaled after the difference: equal logits give exactly zero, fused
/// multiply-add or not.
SAFEGRAD_HOST_DEVICE inline float kl_gradient(float e, float e_r, float ratio, float scale) {
  return (e * ratio - e_r) * scale;
}

}  // namespace safegrad
