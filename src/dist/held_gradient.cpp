#include "dist/held_gradient.h"

namespace safegrad::dist {

std::optional<HeldAlignment> HeldGradient::for_step(int64_t index) const {
  return index % every_ == 0 ? std::nullopt : held_;
}

void HeldGradient::follow(int64_t index, double tokens, bool finite, double& loss) {
  if (for_step(index)) {
    loss = held_->loss;
  } else if (finite && index >= first_) {
    held_ = {tokens, loss};
  } else {
    held_.reset();
  }
}

}  // namespace safegrad::dist
