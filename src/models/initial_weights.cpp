#include "models/initial_weights.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <ATen/Parallel.h>

#include "core/random.h"

namespace safegrad::models {
namespace {

uint64_t key_of(uint64_t seed, const std::string& name) {
  uint64_t key = seed;
  for (char c : name) key = mix64(key, static_cast<unsigned char>(c));
  return key;
}

bool ends_with(const std::string& name, const char* suffix) {
  return name.ends_with(suffix);
}

}  // namespace

void RandomWeights::read(const std::string& name, int64_t begin, int64_t end, float* out) const {
  if (ends_with(name, "norm.weight")) {
    std::fill(out, out + (end - begin), 1.0f);
  } else if (ends_with(name, ".bias")) {
    std::fill(out, out + (end - begin), 0.0f);
  } else {
    const Philox random(key_of(seed_, name));
    at::parallel_for(begin, end, 1 << 14, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto bits = random(static_cast<uint64_t>(i), 0);
        const float radius = std::sqrt(-2.0f * std::log(1.0f - uniform01(bits[0])));  // Box–Muller
        const float angle = 2.0f * std::numbers::pi_v<float> * uniform01(bits[1]);
        out[i - begin] = 0.02f * radius * std::cos(angle);
      }
    });
  }
}

void FreshAdapters::read(const std::string& name, int64_t begin, int64_t end, float* out) const {
  if (ends_with(name, ".lora_B.weight")) {
    std::fill(out, out + (end - begin), 0.0f);
  } else if (const auto input = inputs_.find(name); input != inputs_.end()) {
    const Philox random(key_of(seed_, name));
    const float bound = 1.0f / std::sqrt(static_cast<float>(input->second));
    for (int64_t i = begin; i < end; ++i) {
      out[i - begin] = bound * (2.0f * uniform01(random(static_cast<uint64_t>(i), 0)[0]) - 1.0f);
    }
  } else {
    base_->read(name, begin, end, out);
  }
}

}  // namespace safegrad::models
