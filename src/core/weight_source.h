// weight_source.h: where initial parameter values come from, readable in ranges so that no rank
// holds a whole model.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/parameter.h"

namespace safegrad {

/// Initial values by parameter name. Implementations are deterministic: the same (name, range)
/// gives the same bits on every rank and for every sharding.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  /// out[0 .. end-begin) <- elements [begin, end) of the flattened (row-major) parameter, as float.
  virtual void read(const std::string& name, int64_t begin, int64_t end, float* out) const = 0;
};

/// Hash of 16 elements at the beginning, in the middle and at the end of every tensor that `units`
/// name: tells a model from a later state of its training without reading it.
uint64_t sampled_fingerprint(const std::vector<Unit>& units, const WeightSource& weights);

}  // namespace safegrad
