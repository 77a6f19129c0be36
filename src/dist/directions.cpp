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
      Parameter& of_p = parameters_.emplace_back();
      of_p.name = p->name;
      of_p.block = p->block;
      of_p.shape = p->shape;
      of_p.trainable = false;
      p->direction = &of_p;
      direction.parameters.push_back(&of_p);
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
