#include "dist/run_shape.h"

#include <utility>

namespace safegrad::dist {
namespace {

at::ScalarType scalar_type(ComputeDtype dtype) {
  return dtype == ComputeDtype::bfloat16 ? at::kBFloat16 : at::kFloat;
}

int64_t task_samples(const RunConfig& config, int64_t task_sequences) {
  return config.train.steps ? 0 : config.train.epochs.value_or(1) * task_sequences;
}

}  // namespace

ShardingOptions sharding_options(const RunConfig& config) {
  return {scalar_type(config.model.dtype), scalar_type(config.parallel.reduce_dtype),
          config.parallel.frozen == FrozenWeights::replicated};
}

EngineOptions engine_options(const RunConfig& config, CausalLM& model, bool likelihood_probes) {
  EngineOptions options;
  const bool aligns = config.batch.align_sequences > 0;
  const bool kl = aligns && config.objective.align_loss == AlignLoss::kl;
  if (aligns) options.losses.push_back(kl ? Loss::kl : Loss::cross_entropy);
  options.keep_reference_head = model.head().trainable && (kl || likelihood_probes);
  options.sharding = sharding_options(config);
  options.recompute = config.parallel.recompute;
  options.keep_anchor = takes_turns(config);
  options.keep_direction = config.objective.gate > 0;
  return options;
}

bool scores_all_positions(const RunConfig& config) {
  return config.objective.align_loss == AlignLoss::kl &&
         config.objective.kl_positions == KlPositions::all;
}

Turns turns_of(const RunConfig& config, size_t objective) {
  if (takes_turns(config)) {
    const int64_t align = config.objective.lisa->align_steps;
    const int64_t task = config.objective.lisa->task_steps;
    return objective == 0 ? Turns{align + task, align, task} : Turns{align + task, 0, align};
  }
  return objective == 0 ? Turns{} : Turns{config.objective.align_every, 0, 1};
}

Stream make_stream(const ObjectiveData& data) {
  Stream stream;
  for (int64_t i = 0; i < data.file->size(); ++i) {
    stream.lengths.push_back(data.file->length(i));
    stream.scored.push_back(scored_rows(data, i));
  }
  stream.per_step = data.file->size();
  return stream;
}

StepPlan plan_all(const ObjectiveData& data, int64_t ranks, int64_t max_tokens) {
  return Planner({make_stream(data)}, ranks, max_tokens, 0, 0, 0.0).plan(0);
}

std::vector<Stream> make_streams(const RunConfig& config,
                                 const std::vector<ObjectiveData>& objectives) {
  std::vector<Stream> streams;
  for (const ObjectiveData& objective : objectives) {
    Stream stream = make_stream(objective);
    stream.per_step = streams.empty() ? config.batch.task_sequences : config.batch.align_sequences;
    stream.turns = turns_of(config, streams.size());
    streams.push_back(std::move(stream));
  }
  return streams;
}

int64_t count_steps(const RunConfig& config, int64_t task_sequences) {
  if (config.train.steps) return *config.train.steps;
  const int64_t task_steps =
      (task_samples(config, task_sequences) + config.batch.task_sequences - 1) /
      config.batch.task_sequences;
  return turns_of(config, 0).step_of(task_steps - 1) + 1;
}

Planner make_planner(const RunConfig& config, std::vector<Stream> streams, int64_t task_sequences,
                     CausalLM& model, int64_t ranks) {
  double block_weights = 0;
  for (int64_t b = 0; b < model.blocks(); ++b) {
    for (const Parameter* p : model.units()[model.block_unit(b)].parameters) {
      block_weights += static_cast<double>(p->numel());
    }
  }
  return Planner(std::move(streams), ranks, config.batch.max_tokens_per_rank, config.train.seed,
                 task_samples(config, task_sequences),
                 static_cast<double>(model.head().numel()) / block_weights);
}

std::vector<std::vector<size_t>> make_passes(const RunConfig& config, size_t objectives) {
  std::vector<std::vector<size_t>> passes;
  if (config.objective.gradients == GradientMode::one_pass) passes.emplace_back();
  for (size_t k = 0; k < objectives; ++k) {
    if (config.objective.gradients == GradientMode::two_pass) passes.emplace_back();
    passes.back().push_back(k);
  }
  return passes;
}

bool takes_turns(const RunConfig& config) {
  return config.objective.rule == Rule::lisa;
}

bool exchanges_block_grams(const RunConfig& config) {
  return config.objective.gram_per_block || config.objective.surgery == Surgery::block;
}

// Losses, FLOPs, the notice and the memory, and the Gram matrix of all blocks and, where needed, of
// each.
int64_t step_scalars(const RunConfig& config, size_t objectives, const CausalLM& model) {
  const size_t blocks = exchanges_block_grams(config) ? block_names(model.units()).size() : 0;
  const size_t matrices = 1 + blocks;
  return static_cast<int64_t>(objectives + 4 + matrices * objectives * objectives);
}

}  // namespace safegrad::dist
