// engine_schedule.h: what the engine's passes share: the order of gathers, and what is kept from
// forward to backward. For the sources of Engine alone.
#pragma once
#include <memory>
#include <utility>
#include <vector>

#include "dist/engine.h"

namespace safegrad::dist {

/// Gathers units in the order of their use, one ahead.
class Engine::GatherQueue {
 public:
  GatherQueue(std::vector<ShardedUnit*> order, PhaseClock& clock)
      : order_(std::move(order)), clock_(clock) {
    start_next();
  }

  /// The next `count` units of the order, readable; the one after them is on its way. The caller
  /// releases them.
  void next(size_t count = 1) {
    clock_.enter(Phase::gather);
    while (started_ < used_ + count) start_next();
    for (size_t i = 0; i < count; ++i) order_[used_++]->finish_gather();
    start_next();
  }

 private:
  void start_next() {
    if (started_ >= order_.size()) return;
    order_[started_++]->start_gather();
  }

  std::vector<ShardedUnit*> order_;
  PhaseClock& clock_;
  size_t started_ = 0, used_ = 0;
};

/// Per block: what its backward needs, or only its input where it is recomputed.
struct Engine::Kept {
  explicit Kept(int64_t blocks)
      : inputs(static_cast<size_t>(blocks)), activations(static_cast<size_t>(blocks)) {}

  std::vector<at::Tensor> inputs;
  std::vector<std::unique_ptr<Activations>> activations;
};

}  // namespace safegrad::dist
