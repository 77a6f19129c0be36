#include "dist/directions.h"

namespace safegrad::dist {

Directions::Directions(CausalLM& model, const ShardingOptions& sharding, Mesh& mesh,
                       Buffers& buffers)
    : model_(model) {
  ShardingOptions options = sharding;
  options.replicate_frozen = false;  // laid out as gradients are
  for (const Unit& unit : model.units()) {
    Unit direction{unit.name + " direction", {}, unit.resident};
    for (Parameter* p : unit.parameters) {
      if (!p->trainable) continue;
      parameters_.push_back({p->name, p->shape, /*trainable=*/false, {}, {}, {}, {}, nullptr});
      p->direction = &parameters_.back();
      direction.parameters.push_back(&parameters_.back());
    }
    units_.push_back(direction.parameters.empty()
                         ? nullptr
                         : std::make_unique<ShardedUnit>(direction, 0, options, mesh, buffers));
  }
}

Directions::~Directions() {
  for (const Unit& unit : model_.units()) {
    for (Parameter* p : unit.parameters) p->direction = nullptr;
  }
}

}  // namespace safegrad::dist
