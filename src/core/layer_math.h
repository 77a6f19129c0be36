// layer_math.h: the arithmetic of a decoder layer's element-wise parts, one element at a time: CPU
// loops and GPU kernels call these very functions.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/random.h"
#include "core/vector_math.h"

namespace safegrad {

/// 1 / sqrt(mean(x²) + eps) of a row of `width` elements, from Σ x² (Zhang & Sennrich,
/// arXiv:1910.07467).
SAFEGRAD_HOST_DEVICE inline float rms_scale(float square_sum, float width, float eps) {
  return 1.0f / std::sqrt(square_sum / width + eps);
}

/// y = x rstd w.
SAFEGRAD_HOST_DEVICE inline float normed(float x, float rstd, float w) {
  return x * rstd * w;
}

/// What a row's elements share in the backward: rstd² mean(dy w x), from along = Σ dy w x.
SAFEGRAD_HOST_DEVICE inline float norm_pull(float along, float rstd, float inverse_width) {
  return along * rstd * rstd * inverse_width;
}

/// dx = rstd (dy w − x pull).
SAFEGRAD_HOST_DEVICE inline float norm_input_gradient(float dy, float w, float x, float rstd,
                                                      float pull) {
  return rstd * (dy * w - x * pull);
}

/// A row's part of the weight gradient: dy x rstd.
SAFEGRAD_HOST_DEVICE inline float norm_weight_gradient(float dy, float x, float rstd) {
  return dy * x * rstd;
}

/// (a, b) <- (a cos − b sin, b cos + a sin); with −sin it is the inverse.
SAFEGRAD_HOST_DEVICE inline void rotate_pair(float& a, float& b, float cosine, float sine) {
  const float turned = a * cosine - b * sine;
  b = b * cosine + a * sine;
  a = turned;
}

/// silu(gate) · up.
SAFEGRAD_HOST_DEVICE inline float swiglu_value(float gate, float up) {
  return gate * sigmoid_f32(gate) * up;
}

struct SwigluGradient {
  float act, dgate, dup;
};

/// The value again and the gradients of gate and up: silu' = s + silu (1 − s), s = sigmoid(gate).
SAFEGRAD_HOST_DEVICE inline SwigluGradient swiglu_gradient(float gate, float up, float dact) {
  const float s = sigmoid_f32(gate), silu = gate * s;
  return {silu * up, dact * up * (s + silu * (1.0f - s)), dact * silu};
}

/// Zero or 1 / (1 - p) for every element. 16 random bits an element: one call of the generator
/// serves kGroup neighbouring features, and p is exact to 2⁻¹⁶.
struct DropoutDraw {
  static constexpr int kGroup = 8;
  uint32_t threshold;  ///< p in units of 2⁻¹⁶
  float keep;

  static DropoutDraw of(double p) {
    const auto threshold = static_cast<uint32_t>(std::lround(p * 65536.0));
    return {threshold, 1.0f / (1.0f - static_cast<float>(threshold) / 65536.0f)};
  }
  /// Bits of features [8 group, 8 group + 8) of a token: `key` names its sequence, `site` the place
  /// in the model.
  SAFEGRAD_HOST_DEVICE static RandomBits bits(uint64_t key, uint64_t site, uint64_t position,
                                              uint64_t group) {
    return Philox(mix64(key, site))(group, position);
  }
  /// Factor of the group's feature i, 0 <= i < 8.
  SAFEGRAD_HOST_DEVICE float scale(const RandomBits& bits, int i) const {
    const uint32_t word = bits[i / 2], draw = i % 2 == 0 ? word & 0xFFFFu : word >> 16;
    return draw < threshold ? 0.0f : keep;
  }
};

}  // namespace safegrad
