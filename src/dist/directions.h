// directions.h: a vector over all trainable parameters, sharded and gathered as the weights are.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "core/causal_lm.h"
#include "dist/sharded_unit.h"

namespace safegrad::dist {

/// One parameter more for each trainable one of the model, of the same shape, which
/// Parameter::direction points at as long as this lives. Its shards lie as the gradients' do.
class Directions {
 public:
  /// Collective.
  Directions(CausalLM& model, const ShardingOptions& sharding, Mesh& mesh, Buffers& buffers);
  ~Directions();
  Directions(const Directions&) = delete;
  Directions& operator=(const Directions&) = delete;

  /// The direction's unit of the model's unit; null where that one does not train.
  ShardedUnit* of(size_t unit) const { return units_[unit].get(); }

 private:
  CausalLM& model_;
  std::deque<Parameter> parameters_;  // a deque: addresses stay
  std::vector<std::unique_ptr<ShardedUnit>> units_;
};

}  // namespace safegrad::dist
