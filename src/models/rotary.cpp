#include "models/rotary.h"

#include <cmath>
#include <numbers>
#include <vector>

#include <ATen/ATen.h>

namespace safegrad::models {
namespace {

// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between
// interpolated.
double scaled(double frequency, const Llama3RopeScaling& s) {
  const auto original = static_cast<double>(s.original_max_position_embeddings);
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength < original / s.high_freq_factor) return frequency;
  if (wavelength > original / s.low_freq_factor) return frequency / s.factor;
  const double smooth =
      (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * frequency / s.factor + smooth * frequency;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> rotary_tables(const DecoderConfig& config, int64_t positions) {
  const int64_t half = config.head_dim / 2;
  std::vector<float> frequency(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(config.head_dim);
    double f = 1.0 / std::pow(config.rope_theta, exponent);
    if (config.rope_scaling) f = scaled(f, *config.rope_scaling);
    frequency[static_cast<size_t>(i)] = static_cast<float>(f);
  }
  at::Tensor cos = at::empty({positions, half}, at::kFloat), sin = at::empty_like(cos);
  float* c = cos.mutable_data_ptr<float>();
  float* s = sin.mutable_data_ptr<float>();
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * frequency[static_cast<size_t>(i)];
      *c++ = static_cast<float>(std::cos(static_cast<double>(angle)));
      *s++ = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
  }
  return {cos, sin};
}

}  // namespace safegrad::models
