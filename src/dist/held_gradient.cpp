#include "dist/held_gradient.h"

namespace safegrad::dist {

std::optional<HeldAlignment> HeldGradient::for_step(int64_t index) const {
  return index % every_ == 0 ? std::nullopt : held_;
}

void HeldGradient::follow(int64_t index, double tokens, StepScalars& scalars) {
  if (for_step(index)) {
    scalars.loss[1] = held_->loss;
  } else if (scalars.finite && index >= first_) {
    held_ = {tokens, scalars.loss[1], scalars.gram.at(1, 1)};
  } else {
    held_.reset();
  }
}

}  // namespace safegrad::dist
