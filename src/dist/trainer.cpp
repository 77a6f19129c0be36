#include "dist/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "core/schedule.h"
#include "dist/attribution.h"
#include "dist/run_shape.h"

namespace safegrad::dist {
namespace {

bool any_likelihood_probe(const RunData& data) {
  return std::any_of(data.probes.begin(), data.probes.end(),
                     [](const auto& file) { return !file->has_choices(); });
}

std::vector<ObjectiveData> objective_data(const RunConfig& config, const RunData& data) {
  std::vector<ObjectiveData> objectives = {{data.task.get(), false, {}}};
  if (data.align) objectives.push_back({data.align.get(), scores_all_positions(config), {}});
  return objectives;
}

Blocks blocks_of(Engine& engine) {
  std::set<std::string> trained;
  for (const Unit& unit : engine.model().units()) {
    for (const Parameter* p : unit.parameters) {
      if (p->trainable) trained.insert(p->block);
    }
  }
  Blocks blocks{engine.blocks(), {}};
  for (size_t b = 0; b < blocks.names.size(); ++b) {
    if (trained.contains(blocks.names[b])) blocks.trained.push_back(b);
  }
  return blocks;
}

}  // namespace

Trainer::Trainer(const RunConfig& config, CausalLM& model, const WeightSource& weights,
                 const RunData& data, Mesh& mesh)
    : config_(config),
      mesh_(mesh),
      data_(data),
      engine_(model, mesh, engine_options(config, model, any_likelihood_probe(data))),
      objectives_(objective_data(config, data)),
      total_steps_(count_steps(config, data.task->size())),
      planner_(make_planner(config, make_streams(config, objectives_), data.task->size(), model,
                            mesh.world().size())),
      rule_{config.objective.rule, config.objective.rho, config.objective.cagrad_c},
      held_(config.objective),
      blocks_(blocks_of(engine_)) {
  if (takes_turns(config_)) lisa_.emplace(config_, total_steps_);
  if (config_.objective.gate > 0)
    gate_.emplace(config_.objective.gate, make_stream(objectives_[0]).scored);
  engine_.load(weights);
  start_fingerprint_ = engine_.fingerprint();
  auto reference = [&](const ObjectiveData& objective) {
    references_.push_back(std::make_shared<const ReferenceCache>(
        engine_, mesh_, objective, start_fingerprint_, config_.batch.max_tokens_per_rank,
        config_.output + "/reference"));
    return references_.back();
  };
  const bool kl = data_.align && config_.objective.align_loss == AlignLoss::kl;
  if (kl && data_.stand_in) {
    objectives_[1].reference = [this](int64_t sample) {
      return data_.stand_in(scored_rows(objectives_[1], sample));
    };
  } else if (kl) {
    objectives_[1].reference = [cache = reference(objectives_[1])](int64_t sample) {
      return cache->rows(sample);
    };
  }
  for (size_t i = 0; i < config_.probe.size(); ++i) {
    const auto& file = data_.probes[i];
    probes_.emplace_back(
        config_.probe[i].name, file,
        file->has_choices() ? nullptr : reference(ObjectiveData{file.get(), false, {}}),
        config_.probe[i].every_steps);
  }
  passes_ = make_passes(config_, objectives_.size());
}

void Trainer::measure_speed_of_light() {
  mesh_.world().barrier();  // all ranks at the same time, as in training
  const double own_rate = engine_.backend().measure_gemm_rate(engine_.compute_dtype());
  gemm_rate_ = 0;
  for (double rate : all_gather_doubles(mesh_.world(), std::span(&own_rate, 1))) gemm_rate_ += rate;
}

StepRecord Trainer::step(int64_t index, const Notice& own) {
  const auto start = std::chrono::steady_clock::now();
  engine_.clock().take();
  mesh_.world().about(fmt::format("step {}", index + 1));
  const std::vector<size_t> computed = computed_in(index);
  const StepPlan plan = plan_step(index, /*all=*/computed.size() == objectives_.size());
  const std::vector<double> tokens = tokens_in(plan, index);

  if (lisa_) lisa_->begin_step(engine_, index);
  const PassSums sums = accumulate(plan, computed, index);
  engine_.clock().enter(Phase::surgery);
  if (lisa_) lisa_->measure_drift(engine_, index);
  const at::Tensor block_grams = engine_.inner_products();
  scalars_ = exchange_scalars(engine_, mesh_, sums, block_grams, exchanges_block_grams(config_),
                              own, gate_ ? score_slots(plan) : 0);
  to_means(scalars_, tokens);

  StepRecord record;
  record.skipped = !scalars_.finite;
  if (config_.objective.align_every > 1) record.align_renewed = !held_for(index);
  if (objectives_.size() > 1) held_.follow(index, tokens[1], scalars_);
  if (gate_ && scalars_.finite) gate_->take(plan, scalars_.scores);
  if (!record.skipped) {
    combine_gradients(record, index);
    update(index, record.clip, tokens);
  } else {
    record.not_finite = attribute(mesh_, sums.loss, block_grams, engine_.blocks(), plan);
  }

  describe(record, plan, tokens, index);
  record.phase_seconds = engine_.clock().take();
  record.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  record.tokens_per_s =
      static_cast<double>(record.task_tokens + record.align_tokens) / record.seconds;
  if (gemm_rate_ > 0) record.speed_of_light = record.flops / gemm_rate_ / record.seconds;
  return record;
}

// All decisions are by numbers that the ranks have exchanged in earlier steps.
StepPlan Trainer::plan_step(int64_t index, bool all) {
  std::vector<int64_t> left_out;
  if (gate_) left_out = gate_->leave_out(drawn_task_samples(index));
  gated_ = static_cast<int64_t>(left_out.size());
  const StepPlan plan = planner_.plan(index, all, left_out);
  task_samples_.clear();
  for (const auto& samples : samples_by_rank(plan, 0))
    task_samples_.insert(task_samples_.end(), samples.begin(), samples.end());
  std::sort(task_samples_.begin(), task_samples_.end());
  return plan;
}

// Scores are along the alignment gradient of the step before, which is still in its shards: false
// where there is none, or it is as good as zero. After the last exchange and update no rank reads
// the direction of that step any more.
bool Trainer::point_direction() {
  const auto held = held_.last();
  if (!gate_ || !held || held->aa <= kProjectionGuard) return false;
  engine_.point_along_gradient(1, 1.0 / (std::sqrt(held->aa) * held->tokens));
  return true;
}

// Gradients are summed over tokens, micro-batches and ranks; division by the token counts comes
// later, in the Gram matrix and the coefficients. So no assignment of sequences to ranks or
// micro-batches changes the result.
PassSums Trainer::accumulate(const StepPlan& plan, const std::vector<size_t>& computed,
                             int64_t index) {
  const auto passes =
      computed.size() == objectives_.size() ? passes_ : std::vector<std::vector<size_t>>{computed};
  PassSums sums = engine_.zero_sums();
  const bool scores = point_direction();
  if (scores) sums.scores = at::empty({0}, sums.loss.options());
  engine_.begin_step(scores);
  bool first = true;
  for (const auto& micro_batch : plan.assignment) {
    const auto& draws = micro_batch[static_cast<size_t>(mesh_.world().rank())];
    for (const std::vector<size_t>& active : passes) {
      PackedBatch batch = pack_for(draws, active, index);
      if (scores && active.front() == 0)
        batch.token_scores = at::zeros({batch.segments[1]}, sums.loss.options());
      engine_.forward_backward(batch, active, first, sums);
    }
    first = false;
  }
  engine_.end_step();
  return sums;
}

// The objectives whose gradients a step computes.
std::vector<size_t> Trainer::computed_in(int64_t index) const {
  if (lisa_) return {lisa_->active(index)};
  std::vector<size_t> computed = {0};
  if (objectives_.size() > 1 && !held_for(index)) computed.push_back(1);
  return computed;
}

// What the gradients of a step are sums over. The drift of lisa, which stands in for the gradient
// that is not computed, is no sum.
std::vector<double> Trainer::tokens_in(const StepPlan& plan, int64_t index) const {
  std::vector<double> tokens = scored_tokens(plan);
  if (const auto held = held_for(index)) tokens[1] = held->tokens;
  if (lisa_) tokens[lisa_->resting(index)] = 1;
  return tokens;
}

PackedBatch Trainer::pack_for(const std::vector<Draw>& draws, const std::vector<size_t>& active,
                              int64_t index) const {
  std::vector<Draw> chosen;
  for (const Draw& draw : draws) {
    if (std::find(active.begin(), active.end(), draw.objective) != active.end())
      chosen.push_back(draw);
  }
  const bool dropout = config_.model.lora && config_.model.lora->dropout > 0;
  return upload(pack(chosen, objectives_, {dropout, config_.train.seed, index}), engine_.backend());
}

// The rule sees the whole model's inner products (arXiv:2508.07172) or each block's own. The norm
// that clipping acts on is the whole's in both.
void Trainer::combine_gradients(StepRecord& record, int64_t index) {
  if (config_.objective.surgery == Surgery::block) {
    coefficients_ = combine_blocks(scalars_.block_grams, rule_);
    record.grad_norm = combined_norm(scalars_.block_grams, coefficients_);
  } else {
    const std::vector<double> all =
        lisa_ ? lisa_->coefficients(index) : combine(scalars_.gram, rule_);
    coefficients_.assign(engine_.blocks().size(), all);
    record.grad_norm = combined_norm(scalars_.gram, all);
  }
  record.clip = clip_factor(record.grad_norm, config_.optimizer.clip_norm);
}

void Trainer::update(int64_t index, double clip, const std::vector<double>& tokens) {
  ++updates_;
  const OptimizerSection& o = config_.optimizer;
  const double lr = o.lr * schedule_factor(config_.schedule, index, total_steps_);
  const auto t = static_cast<double>(updates_);
  AdamW adamw;
  adamw.rest1 = static_cast<float>(1 - o.betas[0]);
  adamw.rest2 = static_cast<float>(1 - o.betas[1]);
  adamw.beta2 = static_cast<float>(o.betas[1]);
  adamw.eps = static_cast<float>(o.eps);
  adamw.step_size = static_cast<float>(lr / (1 - std::pow(o.betas[0], t)));
  adamw.inverse_sqrt_bc2 = static_cast<float>(1 / std::sqrt(1 - std::pow(o.betas[1], t)));
  adamw.decay = static_cast<float>(1 - lr * o.weight_decay);
  std::vector<std::vector<double>> per_sum = coefficients_;  // of summed, not averaged, gradients
  for (std::vector<double>& block : per_sum) {
    for (size_t k = 0; k < block.size(); ++k) block[k] = clip * block[k] / tokens[k];
  }
  engine_.update(per_sum, adamw);
}

// The authors divide the KL over all positions by the number of response tokens, so the count is of
// response tokens either way.
std::vector<double> Trainer::scored_tokens(const StepPlan& plan) const {
  std::vector<double> tokens(objectives_.size(), 0.0);
  for (const auto& micro_batch : plan.assignment) {
    for (const auto& draws : micro_batch) {
      for (const Draw& draw : draws) {
        tokens[draw.objective] +=
            static_cast<double>(objectives_[draw.objective].file->scored(draw.sample));
      }
    }
  }
  return tokens;
}

void Trainer::describe(StepRecord& record, const StepPlan& plan, const std::vector<double>& tokens,
                       int64_t index) const {
  record.step = index + 1;
  for (const auto& micro_batch : plan.assignment) {
    for (const auto& draws : micro_batch) {
      for (const Draw& draw : draws) {
        const int64_t length = objectives_[draw.objective].file->length(draw.sample);
        (draw.objective == 0 ? record.task_tokens : record.align_tokens) += length;
      }
    }
  }
  const int64_t drawn = turns_of(config_, 0).before(index) * config_.batch.task_sequences +
                        std::ssize(task_samples_) + gated_;
  record.epoch = static_cast<double>(drawn) / static_cast<double>(data_.task->size());
  if (gate_) record.gated = gated_;
  record.lr = config_.optimizer.lr * schedule_factor(config_.schedule, index, total_steps_);
  record.loss_task = scalars_.loss[0] / tokens[0];
  if (objectives_.size() > 1) record.loss_align = scalars_.loss[1] / tokens[1];
  record.flops = scalars_.flops;
  if (scalars_.memory_bytes > 0) record.memory_bytes = scalars_.memory_bytes;
  if (lisa_) {
    lisa_->describe(record, scalars_.gram, index);
  } else {
    describe_surgery(record, config_.objective, scalars_.gram, scalars_.block_grams, coefficients_,
                     blocks_);
  }
}

std::vector<int64_t> Trainer::drawn_task_samples(int64_t index) const {
  std::vector<int64_t> samples;
  for (const Draw& draw : planner_.draws(index)) {
    if (draw.objective == 0) samples.push_back(draw.sample);
  }
  std::sort(samples.begin(), samples.end());
  return samples;
}

std::map<std::string, std::map<std::string, double>> Trainer::run_probes(int64_t finished) {
  std::vector<const Probe*> due;  // by the step's number alone: the same on every rank
  for (const Probe& probe : probes_) {
    const int64_t every = probe.every_steps();
    if (finished == total_steps_ || (every > 0 && finished % every == 0)) due.push_back(&probe);
  }
  std::map<std::string, std::map<std::string, double>> results;
  if (due.empty()) return results;
  mesh_.world().about("probes");
  engine_.begin_step();
  for (const Probe* probe : due) {
    results[probe->name()] = probe->run(engine_, mesh_, config_.batch.max_tokens_per_rank);
  }
  engine_.release_resident();
  return results;
}

void Trainer::export_model(bool merged, ModelSink* sink) {
  CausalLM& model = engine_.model();
  mesh_.world().about("export");
  engine_.begin_step();
  agree(mesh_.world(), [&] {
    if (sink) sink->begin(model.export_entries(merged));
  });
  for (size_t u = 0; u < model.units().size(); ++u) {
    ShardedUnit& unit = engine_.units()[u];
    unit.finish_gather();
    agree(mesh_.world(), [&] {
      if (sink) model.export_unit(u, merged, *sink);
    });
    if (!unit.unit().resident) unit.release();
  }
  engine_.release_resident();
  agree_patiently(mesh_.world(), [&] {
    if (sink) sink->finish();
  });
}

std::map<std::string, std::map<std::string, double>> evaluate_probes(const RunConfig& config,
                                                                     CausalLM& model,
                                                                     const WeightSource& weights,
                                                                     const RunData& data,
                                                                     Mesh& mesh) {
  EngineOptions options;
  options.sharding = sharding_options(config);
  Engine engine(model, mesh, options);
  engine.load(weights);
  std::map<std::string, std::map<std::string, double>> results;
  engine.begin_step();
  for (size_t i = 0; i < config.probe.size(); ++i) {
    const Probe probe(config.probe[i].name, data.probes[i], nullptr, 0);
    results[probe.name()] = probe.run(engine, mesh, config.batch.max_tokens_per_rank);
  }
  engine.release_resident();
  return results;
}

}  // namespace safegrad::dist
