#include "dist/lisa.h"

#include <cmath>

#include "dist/run_shape.h"

namespace safegrad::dist {

Lisa::Lisa(const RunConfig& config, int64_t total_steps)
    : task_(turns_of(config, 0)), rho_(config.objective.lisa->rho), total_steps_(total_steps) {}

// A phase begins where the weights become its anchor: those at the end of the other one's.
bool Lisa::needs_anchor(int64_t index) const {
  return anchored_ && index % task_.period != 0 && active(index) == active(index - 1);
}

void Lisa::begin_step(Engine& engine, int64_t index) {
  if (needs_anchor(index)) return;
  engine.set_anchor();
  anchored_ = true;
}

void Lisa::measure_drift(Engine& engine, int64_t index) const {
  engine.measure_drift(resting(index));
}

std::vector<double> Lisa::coefficients(int64_t index) const {
  std::vector<double> both(2, 0.0);
  both[active(index)] = 1;
  // No proximal term in the first tenth of the run, as in the authors' program.
  if (static_cast<double>(index) > 0.1 * static_cast<double>(total_steps_))
    both[resting(index)] = rho_;
  return both;
}

void Lisa::describe(StepRecord& record, const Gram& gram, int64_t index) const {
  const size_t own = active(index), other = resting(index);
  const double square = gram.at(own, own);
  if (own == 0) {
    record.uu = square;
    record.loss_align.reset();
  } else {
    record.uu = record.loss_task = std::nan("");
    record.aa = square;
  }
  record.drift = std::sqrt(gram.at(other, other));
  if (record.skipped) return;
  record.c_task = own == 0 ? 1 : 0;
  record.c_align = own == 1 ? 1 : 0;
  record.c_drift = coefficients(index)[other];
}

}  // namespace safegrad::dist
