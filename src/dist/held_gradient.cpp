#include "dist/held_gradient.h"

namespace safegrad::dist {

bool renews_alignment(const ObjectiveSection& objective, int64_t step) {
  return step % objective.align_every == 0 || (step == 1 && objective.align_loss == AlignLoss::kl);
}

std::optional<HeldAlignment> HeldGradient::for_step(int64_t index) const {
  return renews_alignment(objective_, index) ? std::nullopt : held_;
}

void HeldGradient::follow(int64_t index, double tokens, StepScalars& scalars) {
  if (for_step(index)) {
    scalars.loss[1] = held_->loss;
  } else if (scalars.finite) {
    held_ = {tokens, scalars.loss[1], scalars.gram.at(1, 1)};
  } else {
    held_.reset();
  }
}

}  // namespace safegrad::dist
