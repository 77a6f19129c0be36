// vector_math.h: scalar formulas that CPU loops vectorise over and GPU kernels call per element.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/random.h"  // SAFEGRAD_HOST_DEVICE

namespace safegrad {

/// eˣ for x <= 88, about 1 ulp, branch-free so that loops over it vectorise; below -87.3 it returns
/// about 1e-38. x = n ln 2 + r, |r| <= ln 2 / 2; eʳ by its Taylor polynomial of degree 7 (next term
/// < 6e-9); times 2ⁿ through the exponent bits.
SAFEGRAD_HOST_DEVICE inline float exp_f32(float x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2²³: adding and subtracting it rounds to an integer
  x = x < -87.3f ? -87.3f : x;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // n out of the low bits of `shifted`: a NaN must not be converted to an integer.
  constexpr uint32_t kRoundBits = 0x4b400000;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);  // std::bit_cast is not for device code
  bits = (bits - kRoundBits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

/// 1 / (1 + e⁻ˣ).
SAFEGRAD_HOST_DEVICE inline float sigmoid_f32(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  return 1.0f / (1.0f + exp_f32(-clamped));
}

/// A term of a Gram matrix: exact, a product of two floats has at most 48 bits.
SAFEGRAD_HOST_DEVICE inline double gram_term(float a, float b) {
  return static_cast<double>(a) * static_cast<double>(b);
}

/// One element of AdamW (Loshchilov & Hutter, arXiv:1711.05101), in the order of torch.optim.AdamW.
struct AdamW {
  float beta2, eps;
  float rest1, rest2;      ///< 1 - beta1 and 1 - beta2, rounded once: 1 - 0.999f is off by 1e-5
  float step_size;         ///< lr / (1 - beta1^t)
  float inverse_sqrt_bc2;  ///< 1 / sqrt(1 - beta2^t)
  float decay;             ///< 1 - lr * weight_decay

  SAFEGRAD_HOST_DEVICE void operator()(float g, float& m, float& v, float& p) const {
    m = m + rest1 * (g - m);
    v = beta2 * v + rest2 * g * g;
    p = p * decay - step_size * m / (std::sqrt(v) * inverse_sqrt_bc2 + eps);
  }
};

}  // namespace safegrad
