// plan_run.h: one rank of a planned job, run here and now without the others.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "core/config.h"
#include "dist/rank_plan.h"
#include "dist/trainer.h"
#include "models/open_model.h"

namespace safegrad {

/// What one step of one rank held and sent.
struct RankRun {
  int64_t tensor_bytes = 0;    ///< most that CPU tensors held at a time
  int64_t resident_bytes = 0;  ///< most that the process has held so far, libraries and runs before
  std::map<std::string, dist::Traffic> traffic;
  double seconds = 0;
};

/// Trains the step that `plan` describes twice as its rank, alone, on the CPU, and measures the
/// second time, when buffers have been made: the trainer, the engine and the kernels are those of a
/// job, what other ranks would send is zeros (dist/fake_communicator.h) and the reference's hidden
/// states are too. `config` and `data` are those that the plan was made of, `plan` one of ranks
/// that exchange messages.
RankRun run_rank(const RunConfig& config, models::OpenedModel& model, dist::RunData data,
                 const dist::RankPlan& plan);

/// What run_rank's tensors should hold: the plan of a step without a checkpoint's copy, which a run
/// of two steps does not make.
int64_t planned_tensor_bytes(const dist::RankPlan& plan);

/// Throws RunError where memory is more than 5 % off, or calls or bytes of any collective differ,
/// be it in the plan or in the run alone.
void check_run(const dist::RankPlan& plan, const RankRun& run);

}  // namespace safegrad
