// run_shape.h: what of a run follows from its config and the lengths of its sequences alone; the
// trainer runs it, an estimate counts it.
#pragma once
#include <cstdint>
#include <vector>

#include "core/causal_lm.h"
#include "core/config.h"
#include "core/pack.h"
#include "core/planner.h"
#include "dist/engine.h"

namespace safegrad::dist {

/// Types and sharding of the engine's units.
ShardingOptions sharding_options(const RunConfig& config);
/// Losses, sharding and recomputation; a frozen head is kept where the head trains and a KL to the
/// start model is wanted: by the alignment loss or by a likelihood probe.
EngineOptions engine_options(const RunConfig& config, CausalLM& model, bool likelihood_probes);

/// The alignment loss is scored at every position (the authors' KL), not only before response
/// tokens.
bool scores_all_positions(const RunConfig& config);
/// The steps in which an objective's gradient is computed.
Turns turns_of(const RunConfig& config, size_t objective);
/// Lengths and scored rows of a file, all of whose sequences are one step's.
Stream make_stream(const ObjectiveData& data);
/// Every sequence of the file once, in micro-batches of at most `max_tokens` a rank.
StepPlan plan_all(const ObjectiveData& data, int64_t ranks, int64_t max_tokens);
/// Lengths and scored rows of every objective, task first, with the sequences of one step.
std::vector<Stream> make_streams(const RunConfig& config,
                                 const std::vector<ObjectiveData>& objectives);
/// Optimizer steps of the run on `task_sequences` sequences.
int64_t count_steps(const RunConfig& config, int64_t task_sequences);
/// The planner of the run's steps. Throws DataError if a sequence fits in no micro-batch.
Planner make_planner(const RunConfig& config, std::vector<Stream> streams, int64_t task_sequences,
                     CausalLM& model, int64_t ranks);
/// The objectives of each pass over a micro-batch: {{0, 1}} in one pass, {{0}, {1}} in two.
std::vector<std::vector<size_t>> make_passes(const RunConfig& config, size_t objectives);
/// The Gram matrix of every block travels along with that of the whole: it is recorded or acted on.
bool exchanges_block_grams(const RunConfig& config);
/// Rule lisa: a step runs one objective's sequences alone, and computes its gradient.
bool takes_turns(const RunConfig& config);
/// Numbers (fp64) that a rank sends in a step's one exchange of scalars, scores apart
/// (score_slots).
int64_t step_scalars(const RunConfig& config, size_t objectives, const CausalLM& model);

}  // namespace safegrad::dist
