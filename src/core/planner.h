// planner.h: decides which sample goes to which rank and micro-batch; every rank derives the same
// plan alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace safegrad {

/// A sample drawn for a step.
struct Draw {
  size_t objective;  ///< 0 task, 1 alignment
  int64_t sample;    ///< index in the objective's token file
};

/// assignment[m][r]: what rank r runs in micro-batch m, task draws first; lists may be empty.
struct StepPlan {
  std::vector<std::vector<std::vector<Draw>>> assignment;
};

/// By rank, the samples of objective k in the order in which the rank runs them.
std::vector<std::vector<int64_t>> samples_by_rank(const StepPlan& plan, size_t k);

/// Which steps it is an objective's turn: steps first .. first + count − 1 of every `period`.
struct Turns {
  int64_t period = 1, first = 0, count = 1;

  bool due(int64_t step) const {
    const int64_t at = step % period - first;
    return at >= 0 && at < count;
  }
  /// Turns of the steps before `step`.
  int64_t before(int64_t step) const {
    const int64_t at = step % period - first;
    return step / period * count + (at < 0 ? 0 : at < count ? at : count);
  }
  /// The step of turn `turn`, from 0.
  int64_t step_of(int64_t turn) const { return turn / count * period + first + turn % count; }
};

/// One stream of samples: how long they are and how many a step takes.
struct Stream {
  std::vector<int64_t> lengths;  ///< tokens
  std::vector<int64_t> scored;   ///< scored positions
  int64_t per_step = 0;
  Turns turns = {};  ///< the steps that draw from it
};

/// Draws samples without replacement epoch by epoch, in an order that depends on (seed, objective,
/// epoch) alone, and spreads a step's draws over ranks and micro-batches by cost, longest first
/// (LPT). Each micro-batch of a rank holds at most `max_tokens` tokens; all ranks run the same
/// number of micro-batches.
class Planner {
 public:
  /// `total_task_samples`: the task stream ends after so many draws, which makes the last step
  /// smaller; 0: it never ends. `scored_cost`: cost of a scored position in units of one token's
  /// pass through the blocks. Throws DataError if a sample is longer than max_tokens.
  Planner(std::vector<Stream> streams, int64_t ranks, int64_t max_tokens, uint64_t seed,
          int64_t total_task_samples, double scored_cost);

  /// `all`: draws also from streams that are not due, what their last turn drew. `left_out`: task
  /// samples, ascending, that are drawn but do not run.
  StepPlan plan(int64_t step, bool all = false, const std::vector<int64_t>& left_out = {}) const;
  /// Samples of objective k that step `step` draws, in stream order.
  std::vector<Draw> draws(int64_t step, bool all = false) const;

 private:
  int64_t sample_at(size_t objective, int64_t position) const;

  std::vector<Stream> streams_;
  int64_t ranks_, max_tokens_;
  uint64_t seed_;
  int64_t total_task_samples_;
  double scored_cost_;
  struct Epoch {
    int64_t number = -1;
    std::vector<int64_t> order;
  };
  mutable std::vector<Epoch>
      epochs_;  // the last order of each stream, kept because steps ask in sequence
};

/// The order of `n` samples in an epoch: Fisher–Yates with counter-based draws.
std::vector<int64_t> epoch_order(int64_t n, uint64_t seed, size_t objective, int64_t epoch);

}  // namespace safegrad
