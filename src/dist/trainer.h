// trainer.h: the training step, and what it needs from one step to the next.
#pragma once
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/causal_lm.h"
#include "core/config.h"
#include "core/metrics.h"
#include "core/pack.h"
#include "core/planner.h"
#include "core/surgery.h"
#include "dist/engine.h"
#include "dist/gate.h"
#include "dist/held_gradient.h"
#include "dist/lisa.h"
#include "dist/mesh.h"
#include "dist/probe.h"
#include "dist/reference_cache.h"
#include "dist/run_data.h"
#include "dist/step_scalars.h"
#include "dist/surgery_record.h"

namespace safegrad::dist {

/// Trains `model` as `config` says. All ranks construct it and call the same functions. Memory:
/// shards of master weights, moments and one gradient per objective, plus the engine's buffers.
class Trainer {
 public:
  /// Reads the weights; computes the reference's hidden states where a KL needs them.
  Trainer(const RunConfig& config, CausalLM& model, const WeightSource& weights,
          const RunData& data, Mesh& mesh);

  /// Measures the GEMM rate that speed_of_light in later records is a share of (0 before). Half a
  /// second; collective.
  void measure_speed_of_light();

  int64_t total_steps() const { return total_steps_; }
  /// One optimizer step (design §2); `index` counts from 0. One reduction of scalars decides
  /// everything on every rank; where it is not finite, a second one says what broke.
  StepRecord step(int64_t index, const Notice& own = {});
  /// The notices of all ranks, joined, as they stood in the last step.
  const Notice& notice() const { return scalars_.notice; }
  /// Runs the probes due after `finished` steps (all of them at the end); name -> measures.
  /// Collective.
  std::map<std::string, std::map<std::string, double>> run_probes(int64_t finished);
  /// Streams the model to `sink` (rank 0's; null elsewhere) unit by unit. Collective.
  void export_model(bool merged, ModelSink* sink);

  /// The task samples that step `index` draws, ascending, those that a gate leaves out included.
  std::vector<int64_t> drawn_task_samples(int64_t index) const;
  /// The task samples that the last step ran, ascending.
  const std::vector<int64_t>& task_samples() const { return task_samples_; }

  Engine& engine() { return engine_; }
  /// The data of objective k as steps pack it, the KL's reference included.
  const ObjectiveData& objective(size_t k) const { return objectives_[k]; }
  /// Content hash of the model that training started from.
  uint64_t start_fingerprint() const { return start_fingerprint_; }
  /// Steps that were not skipped: AdamW's t. With the units' state, what kept_for() says and the
  /// gate's scores, all that a step leaves to the next: samples and dropout follow from the step's
  /// number.
  int64_t updates() const { return updates_; }
  void set_updates(int64_t updates) { updates_ = updates; }
  /// What step `index` takes over of the last alignment gradient; empty where it computes its own.
  std::optional<HeldAlignment> held_for(int64_t index) const { return held_.for_step(index); }
  /// What step `index` uses of the last alignment gradient: in its update, or to score samples.
  std::optional<HeldAlignment> kept_for(int64_t index) const {
    return gate_ ? held_.last() : held_for(index);
  }
  /// The alignment gradient is in the units' shards.
  void hold(const HeldAlignment& held) { held_.hold(held); }
  /// Step `index` uses the units' anchors (rule lisa), which an earlier step has set.
  bool needs_anchor(int64_t index) const { return lisa_ && lisa_->needs_anchor(index); }
  /// The anchor of rule lisa is in the units' shards.
  void hold_anchor() { lisa_->hold_anchor(); }
  /// With objective.gate, else null. Its scores are part of what a step leaves to the next.
  Gate* gate() { return gate_ ? &*gate_ : nullptr; }
  const Gate* gate() const { return gate_ ? &*gate_ : nullptr; }
  double gemm_rate() const { return gemm_rate_; }          ///< FLOP/s of all ranks together
  const Gram& last_gram() const { return scalars_.gram; }  ///< of mean gradients
  /// By block of engine().blocks(), before clipping; with global surgery all are the same.
  const std::vector<std::vector<double>>& last_coefficients() const { return coefficients_; }

 private:
  std::vector<size_t> computed_in(int64_t index) const;
  StepPlan plan_step(int64_t index, bool all);
  bool point_direction();
  std::vector<double> tokens_in(const StepPlan& plan, int64_t index) const;
  PassSums accumulate(const StepPlan& plan, const std::vector<size_t>& computed, int64_t index);
  PackedBatch pack_for(const std::vector<Draw>& draws, const std::vector<size_t>& active,
                       int64_t index) const;
  void update(int64_t index, double clip, const std::vector<double>& tokens);
  std::vector<double> scored_tokens(const StepPlan& plan) const;
  void combine_gradients(StepRecord& record, int64_t index);
  void describe(StepRecord& record, const StepPlan& plan, const std::vector<double>& tokens,
                int64_t index) const;

  const RunConfig config_;
  Mesh& mesh_;
  RunData data_;
  Engine engine_;
  std::vector<ObjectiveData> objectives_;
  std::vector<std::shared_ptr<const ReferenceCache>> references_;
  std::vector<Probe> probes_;
  std::vector<std::vector<size_t>>
      passes_;  // objectives of each pass: {{0, 1}} in one, {{0}, {1}} in two
  int64_t total_steps_;
  Planner planner_;
  RuleOptions rule_;
  HeldGradient held_;
  std::optional<Lisa> lisa_;
  std::optional<Gate> gate_;
  double gemm_rate_ = 0;  // all ranks together
  int64_t updates_ = 0;
  uint64_t start_fingerprint_ = 0;
  Blocks blocks_;
  StepScalars scalars_;  // of the last step, Gram matrices of mean gradients
  std::vector<std::vector<double>> coefficients_;
  std::vector<int64_t> task_samples_;  // that the last step ran
  int64_t gated_ = 0;                  // draws that it left out
};

/// Scores a model on the config's probes without training; name -> measures. Files without choices
/// give their loss alone. Collective.
std::map<std::string, std::map<std::string, double>> evaluate_probes(const RunConfig& config,
                                                                     CausalLM& model,
                                                                     const WeightSource& weights,
                                                                     const RunData& data,
                                                                     Mesh& mesh);

}  // namespace safegrad::dist
