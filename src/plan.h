// plan.h: from a job to what its plan is made of, and a plan in words.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "dist/rank_plan.h"
#include "dist/trainer.h"
#include "plan_run.h"

namespace safegrad {

/// Of opened data, on CPU ranks of which `near` share a machine, or on GPUs. Without rates: for
/// memory alone.
dist::PlanInput plan_input(const RunConfig& config, const dist::RunData& data, bool gpu,
                           int64_t near);

/// "1.4 GiB planned (weights 0.3, gradients 0.0, optimizer 0.0, activations 0.9, buffers 0.2)", at
/// the peak; logits and reference count as activations. MiB where it is less than one GiB.
std::string memory_in_words(const dist::MemoryEstimate& memory);

/// What a table of plans is about.
struct PlanTitle {
  std::string model, training;  ///< names
  std::string device, inside, between;
  int64_t ranks_per_node = 1;
  double gemm_tflops = 0, memory_gb_per_s = 0;  ///< that times are made of, the shares applied
  std::string lengths;                          ///< where they come from
  int64_t max_tokens = 0;                       ///< batch.max_tokens_per_rank
};

/// The plan of so many ranks, or why there is none.
struct PlanOrReason {
  int64_t ranks = 0;
  std::optional<dist::RankPlan> plan;
  std::string reason;
};

/// For people: everything about one plan, or a line for each of several, at least one with a plan,
/// and what the columns are.
std::string plan_in_full(const PlanTitle& title, const dist::RankPlan& plan);
std::string plan_table(const PlanTitle& title, const std::vector<PlanOrReason>& rows);
/// For programs: one line of JSON; times in seconds, sizes in bytes. `run` may be null.
std::string plan_json(const PlanTitle& title, const dist::RankPlan& plan, const RankRun* run);
/// The same of ranks that cannot be planned.
std::string plan_json(int64_t ranks, const std::string& reason);
std::string run_in_words(const dist::RankPlan& plan, const RankRun& run);

}  // namespace safegrad
