// initial_weights.h: where training starts: random base weights for benchmarks, and fresh LoRA
// adapters.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "core/weight_source.h"

namespace safegrad::models {

/// Random weights: matrices N(0, 0.02²), norms 1, biases 0. Element i of a tensor depends on (seed,
/// name, i) alone.
class RandomWeights : public WeightSource {
 public:
  explicit RandomWeights(uint64_t seed) : seed_(seed) {}
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override;

 private:
  uint64_t seed_;
};

/// Adapters as PEFT starts them: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt(5)), B zero, so
/// that the model starts unchanged. Everything else comes from `base`.
class FreshAdapters : public WeightSource {
 public:
  /// `inputs`: the number of input features of every A matrix, by name.
  FreshAdapters(std::unique_ptr<WeightSource> base, uint64_t seed,
                std::map<std::string, int64_t> inputs)
      : base_(std::move(base)), seed_(seed), inputs_(std::move(inputs)) {}
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override;

 private:
  std::unique_ptr<WeightSource> base_;
  uint64_t seed_;
  std::map<std::string, int64_t> inputs_;
};

}  // namespace safegrad::models
