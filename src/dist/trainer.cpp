#include "dist/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "core/config_place.h"
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

// Inner products of summed gradients -> of gradients that are means per token.
void to_means(Gram& gram, const std::vector<double>& tokens) {
  for (size_t i = 0; i < gram.size; ++i) {
    for (size_t j = 0; j < gram.size; ++j) gram.at(i, j) /= tokens[i] * tokens[j];
  }
}

}  // namespace

RunData open_data(const RunConfig& config, const CausalLM& model,
                  const std::string& tokenizer_sha256, std::vector<std::string>& warnings) {
  const TokenFileExpectation expected{tokenizer_sha256, model.vocab_size(), model.max_positions()};
  auto open = [&](const std::string& key, const std::string& path) {
    try {
      return std::make_shared<const TokenFile>(path, expected, warnings);
    } catch (const InputError& error) {
      throw NamedFileError(key, error.what());
    }
  };
  RunData data;
  if (!config.data.task.empty()) data.task = open("data.task", config.data.task);
  if (config.batch.align_sequences > 0) data.align = open("data.align", config.data.align);
  for (size_t i = 0; i < config.probe.size(); ++i)
    data.probes.push_back(open(fmt::format("probe[{}].file", i), config.probe[i].file));
  return data;
}

/// One step's sums over all ranks.
struct Trainer::Totals {
  std::vector<double> loss;
  double flops = 0;
  int64_t memory_bytes = 0;  // of the fullest rank
  bool finite = true;
};

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
      gram_(engine_.objectives()) {
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
  std::set<std::string> trained;
  for (const Unit& unit : model.units()) {
    for (const Parameter* p : unit.parameters) {
      if (p->trainable) trained.insert(p->block);
    }
  }
  for (size_t b = 0; b < engine_.blocks().size(); ++b) {
    if (trained.contains(engine_.blocks()[b])) trained_blocks_.push_back(b);
  }
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
  const StepPlan plan = planner_.plan(index, /*all=*/computed.size() == objectives_.size());
  const std::vector<double> tokens = tokens_in(plan, index);

  if (takes_turns(config_) && !needs_anchor(index)) engine_.set_anchor();
  const PassSums sums = accumulate(plan, computed, index);
  engine_.clock().enter(Phase::surgery);
  if (takes_turns(config_)) engine_.measure_drift(1 - computed.front());
  const at::Tensor block_grams = engine_.inner_products();
  Totals totals = reduce(sums, block_grams, own);
  engine_.clock().enter(Phase::surgery);
  to_means(gram_, tokens);
  for (Gram& block : block_grams_) to_means(block, tokens);
  StepRecord record;
  record.skipped = !totals.finite;
  if (config_.objective.align_every > 1) record.align_renewed = !held_for(index);
  hold_alignment(index, tokens, totals);
  anchored_ = true;
  if (!record.skipped) {
    combine_gradients(record, index);
    update(index, record.clip, tokens);
  } else {
    record.not_finite = attribute(mesh_, sums.loss, block_grams, engine_.blocks(), plan);
  }

  if (totals.memory_bytes > 0) record.memory_bytes = totals.memory_bytes;
  record.loss_task = totals.loss[0] / tokens[0];
  if (objectives_.size() > 1) record.loss_align = totals.loss[1] / tokens[1];
  describe(record, plan, index);
  record.phase_seconds = engine_.clock().take();
  record.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  record.tokens_per_s =
      static_cast<double>(record.task_tokens + record.align_tokens) / record.seconds;
  record.flops = totals.flops;
  if (gemm_rate_ > 0) record.speed_of_light = totals.flops / gemm_rate_ / record.seconds;
  return record;
}

// Gradients are summed over tokens, micro-batches and ranks; division by the token counts comes
// later, in the Gram matrix and the coefficients. So no assignment of sequences to ranks or
// micro-batches changes the result.
PassSums Trainer::accumulate(const StepPlan& plan, const std::vector<size_t>& computed,
                             int64_t index) {
  const auto passes =
      computed.size() == objectives_.size() ? passes_ : std::vector<std::vector<size_t>>{computed};
  PassSums sums = engine_.zero_sums();
  engine_.begin_step();
  bool first = true;
  for (const auto& micro_batch : plan.assignment) {
    const auto& draws = micro_batch[static_cast<size_t>(mesh_.world().rank())];
    for (const std::vector<size_t>& active : passes) {
      engine_.forward_backward(pack_for(draws, active, index), active, first, sums);
    }
    first = false;
  }
  engine_.end_step();
  return sums;
}

// The objectives whose gradients a step computes.
std::vector<size_t> Trainer::computed_in(int64_t index) const {
  if (takes_turns(config_)) return {turns_of(config_, 0).due(index) ? size_t{0} : size_t{1}};
  std::vector<size_t> computed = {0};
  if (objectives_.size() > 1 && !held_for(index)) computed.push_back(1);
  return computed;
}

// What the gradients of a step are sums over. The drift of lisa, which stands in for the gradient
// that is not computed, is no sum.
std::vector<double> Trainer::tokens_in(const StepPlan& plan, int64_t index) const {
  std::vector<double> tokens = scored_tokens(plan);
  if (const auto held = held_for(index)) tokens[1] = held->tokens;
  if (takes_turns(config_)) tokens[1 - computed_in(index).front()] = 1;
  return tokens;
}

// A phase begins where the weights become its anchor: those at the end of the other one's.
bool Trainer::needs_anchor(int64_t index) const {
  if (!takes_turns(config_) || !anchored_) return false;
  return index % turns_of(config_, 0).period != 0 && computed_in(index) == computed_in(index - 1);
}

std::optional<HeldAlignment> Trainer::held_for(int64_t index) const {
  return index % config_.objective.align_every == 0 ? std::nullopt : held_;
}

// A gradient of a step that was not finite is not used again: the next step computes its own.
void Trainer::hold_alignment(int64_t index, const std::vector<double>& tokens, Totals& totals) {
  if (objectives_.size() < 2 || takes_turns(config_)) return;
  if (held_for(index)) {
    totals.loss[1] = held_->loss;
  } else if (totals.finite) {
    held_ = {index, tokens[1], totals.loss[1]};
  } else {
    held_.reset();
  }
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

// The step's only exchange of scalars, and the only time that the host waits for a GPU: every
// rank's values, summed in rank order, so that all ranks hold the same bits. Inner products are
// summed over the ranks of one replica (replicas hold the same shards), losses over all ranks. The
// notices travel along, so that a request to one rank is everybody's at the same step, and the
// memory that each rank has held.
Trainer::Totals Trainer::reduce(const PassSums& sums, const at::Tensor& block_grams,
                                const Notice& own) {
  const auto memory = static_cast<double>(engine_.backend().peak_bytes());
  const at::Tensor host = engine_.backend().upload(
      at::tensor({sums.flops, own.stop ? 1.0 : 0.0, own.writing ? 1.0 : 0.0, memory}, at::kDouble));
  std::vector<at::Tensor> parts = {sums.loss, host, block_grams.sum(0).flatten()};
  if (exchanges_block_grams(config_)) parts.push_back(block_grams.flatten());
  const at::Tensor values = at::cat(parts);

  engine_.clock().enter(Phase::wait);
  const std::vector<double> all = mesh_.world().all_gather_scalars(values);
  engine_.clock().enter(Phase::surgery);
  const auto n = static_cast<size_t>(values.numel()), k = gram_.size, per_gram = k * k;
  const size_t grams = k + 4;  // before them: losses, flops, the notice, the memory
  std::vector<double> sum(n, 0.0);
  for (int r = 0; r < mesh_.world().size(); ++r) {
    for (size_t i = 0; i < n; ++i) {
      if (i < grams || r < mesh_.shards()) sum[i] += all[static_cast<size_t>(r) * n + i];
    }
  }
  Totals totals;
  for (size_t i = k + 3; i < all.size(); i += n)
    totals.memory_bytes = std::max(totals.memory_bytes, static_cast<int64_t>(all[i]));
  totals.loss.assign(sum.begin(), sum.begin() + static_cast<std::ptrdiff_t>(k));
  totals.flops = sum[k];
  notice_ = {sum[k + 1] > 0, sum[k + 2] > 0};
  totals.finite = std::all_of(sum.begin(), sum.end(), [](double v) { return std::isfinite(v); });
  auto next_gram = [&, next = grams]() mutable {
    Gram gram(k);
    for (double& value : gram.values) value = sum[next++];
    return gram;
  };
  gram_ = next_gram();
  block_grams_.clear();
  for (size_t left = n - grams - per_gram; left > 0; left -= per_gram)
    block_grams_.push_back(next_gram());
  return totals;
}

// The rule sees the whole model's inner products (arXiv:2508.07172) or each block's own. The norm
// that clipping acts on is the whole's in both.
void Trainer::combine_gradients(StepRecord& record, int64_t index) {
  if (takes_turns(config_)) {
    // No proximal term in the first tenth of the run, as in the authors' program.
    const size_t active = computed_in(index).front();
    std::vector<double> all(2, 0.0);
    all[active] = 1;
    if (static_cast<double>(index) > 0.1 * static_cast<double>(total_steps_))
      all[1 - active] = config_.objective.lisa->rho;
    coefficients_.assign(engine_.blocks().size(), all);
    record.grad_norm = combined_norm(gram_, all);
  } else if (config_.objective.surgery == Surgery::block) {
    coefficients_ = combine_blocks(block_grams_, rule_);
    record.grad_norm = combined_norm(block_grams_, coefficients_);
  } else {
    const std::vector<double> all = combine(gram_, rule_);
    coefficients_.assign(engine_.blocks().size(), all);
    record.grad_norm = combined_norm(gram_, all);
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

void Trainer::describe(StepRecord& record, const StepPlan& plan, int64_t index) const {
  record.step = index + 1;
  int64_t task_draws = 0;
  for (const auto& micro_batch : plan.assignment) {
    for (const auto& draws : micro_batch) {
      for (const Draw& draw : draws) {
        const int64_t length = objectives_[draw.objective].file->length(draw.sample);
        (draw.objective == 0 ? record.task_tokens : record.align_tokens) += length;
        task_draws += draw.objective == 0;
      }
    }
  }
  const double drawn = static_cast<double>(
      turns_of(config_, 0).before(index) * config_.batch.task_sequences + task_draws);
  record.epoch = drawn / static_cast<double>(data_.task->size());
  record.lr = config_.optimizer.lr * schedule_factor(config_.schedule, index, total_steps_);
  if (takes_turns(config_)) return describe_lisa(record, index);
  record.uu = gram_.at(0, 0);
  auto mean = [&](size_t k) {
    double sum = 0;
    for (size_t b : trained_blocks_) sum += coefficients_[b][k];
    return sum / static_cast<double>(trained_blocks_.size());
  };
  const bool global = config_.objective.surgery == Surgery::global;
  if (!record.skipped) record.c_task = global ? coefficients_[0][0] : mean(0);
  if (gram_.size < 2) return;
  record.ua = gram_.at(0, 1);
  record.aa = gram_.at(1, 1);
  record.cosine = cosine(gram_);
  record.conflict = gram_.at(0, 1) < 0;
  if (!record.skipped) record.c_align = global ? coefficients_[0][1] : mean(1);
  describe_blocks(record);
}

// One gradient a step: what the other would be is not measured.
void Trainer::describe_lisa(StepRecord& record, int64_t index) const {
  const size_t active = computed_in(index).front(), other = 1 - active;
  const double square = gram_.at(active, active);
  if (active == 0) {
    record.uu = square;
    record.loss_align.reset();
  } else {
    record.uu = record.loss_task = std::nan("");
    record.aa = square;
  }
  record.drift = std::sqrt(gram_.at(other, other));
  if (record.skipped) return;
  record.c_task = active == 0 ? 1 : 0;
  record.c_align = active == 1 ? 1 : 0;
  record.c_drift = coefficients_.front()[other];
}

// With layer-wise surgery c_task and c_align are means over the blocks that train.
void Trainer::describe_blocks(StepRecord& record) const {
  const bool layer_wise = config_.objective.surgery == Surgery::block;
  if (layer_wise && !record.skipped) {
    BlockCoefficients& range = record.block_coefficients.emplace();
    for (size_t b : trained_blocks_) {
      range.conflicts += block_grams_[b].at(0, 1) < 0;
      for (size_t k = 0; k < 2; ++k) {
        std::array<double, 2>& bounds = k == 0 ? range.task : range.align;
        const double c = coefficients_[b][k];
        const bool first = b == trained_blocks_.front();
        bounds = {first ? c : std::min(bounds[0], c), first ? c : std::max(bounds[1], c)};
      }
    }
  }
  if (!config_.objective.gram_per_block) return;
  for (size_t b = 0; b < block_grams_.size(); ++b) {
    const Gram& g = block_grams_[b];
    record.blocks[engine_.blocks()[b]] = {
        {"uu", g.at(0, 0)}, {"ua", g.at(0, 1)}, {"aa", g.at(1, 1)}};
  }
  if (!record.block_coefficients) return;
  for (size_t b : trained_blocks_) {
    record.blocks[engine_.blocks()[b]]["c_task"] = coefficients_[b][0];
    record.blocks[engine_.blocks()[b]]["c_align"] = coefficients_[b][1];
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
