// engine.h: forward and backward of a sharded model, unit by unit: gather → run → release, and
// reduce behind the backward.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/causal_lm.h"
#include "core/config.h"
#include "dist/buffer_pool.h"
#include "dist/mesh.h"
#include "dist/phase_clock.h"
#include "dist/sharded_unit.h"

namespace safegrad::dist {

class Directions;

/// How one objective is scored.
enum class Loss { cross_entropy, kl };

struct EngineOptions {
  std::vector<Loss> losses = {Loss::cross_entropy};  ///< one per objective
  bool keep_reference_head = false;  ///< a frozen head of its own for the KL's reference
  bool keep_anchor = false;          ///< weights of an earlier step, for a proximal term
  bool keep_direction = false;       ///< steps score the tokens of objective 0 along a direction
  ShardingOptions sharding;
  Recompute recompute = Recompute::none;
};

/// What micro-batches add up to on this rank.
struct PassSums {
  at::Tensor loss;   ///< [K] f64 on the device, each summed over scored positions
  double flops = 0;  ///< necessary matrix products (design §2), the reference head included
  /// f64 on the device: a score for each sequence of objective 0 that ran, in order; undefined
  /// where none is scored.
  at::Tensor scores;
};

/// What a scoring pass finds of every token.
struct TokenScores {
  at::Tensor
      scores;  ///< [T] f64 on the device; a sequence's sum is ⟨its summed gradient, direction⟩
  at::Tensor log_p;  ///< [S] f64 on the device, of the targets
};

/// Owns the sharded units of a model and the schedule of their gathers and reductions. Every rank
/// calls the same functions in the same order, also with an empty batch. The next unit's gather is
/// under way while a unit runs; a unit's reduce-scatters are under way during the backward of the
/// next. Fully sharded, a step gathers each block twice (forward, backward) and reduces it once per
/// objective; a tied embedding is gathered for the lookup and for the head.
class Engine {
 public:
  Engine(CausalLM& model, Mesh& mesh, EngineOptions options);
  ~Engine();

  /// Reads every parameter's range of this rank; keeps a frozen copy of the head for the KL where
  /// the head trains. Collective: where a rank cannot read, JobFailed leaves on all.
  void load(const WeightSource& weights);
  /// The frozen head from elsewhere than load() took it. Collective, as load().
  void load_reference_head(const WeightSource& weights);
  /// Content hash of the weights, the same for every sharding. Communicates (one gather of words).
  uint64_t fingerprint();

  CausalLM& model() { return model_; }
  const Backend& backend() const { return model_.backend(); }
  const Kernels& kernels() const { return backend().kernels(); }
  std::vector<ShardedUnit>& units() { return units_; }
  const std::vector<ShardedUnit>& units() const { return units_; }
  PhaseClock& clock() { return clock_; }
  size_t objectives() const { return options_.losses.size(); }
  at::ScalarType compute_dtype() const { return options_.sharding.compute_dtype; }

  /// Brackets the micro-batches of a step: resident units are gathered, with `scores` their
  /// directions, too, and reduced after the last. An objective that is in none of them keeps its
  /// gradient of an earlier step.
  void begin_step(bool scores = false);
  void end_step();
  /// Releases what begin_step gathered, where no gradient was computed in between.
  void release_resident();

  /// One pass, two gradients: forward and backward of all objectives in `active` (those of the
  /// batch), gradients into the units, losses added to `sums`. `first`: the step's first
  /// contribution of these objectives. Where the batch has token_scores, all zero, every sequence
  /// of objective 0 is scored beside its gradient: ⟨its summed gradient, direction⟩ is appended to
  /// sums.scores. Directions are gathered with their units.
  void forward_backward(const PackedBatch& batch, const std::vector<size_t>& active, bool first,
                        PassSums& sums);
  PassSums zero_sums() const;

  /// g = Σ_k coefficients[b][k] · gradient k in block b of blocks(), and AdamW, on every shard.
  /// Collective; all ranks have exchanged the step's scalars, so that none is still reading
  /// weights.
  void update(const std::vector<std::vector<double>>& coefficients, const AdamW& adamw);

  /// The weights of now become the anchor.
  void set_anchor();
  bool keeps_anchor() const { return options_.keep_anchor; }
  /// The gradient of objective k, which is in none of the step's passes, <- w − anchor: the
  /// gradient of |w − anchor|² / 2. Every replica computes the same.
  void measure_drift(size_t k);

  /// What inner products are of: embedding, decoder blocks, head, in this order. Adapters count to
  /// the block that they act in.
  const std::vector<std::string>& blocks() const { return blocks_; }
  /// [blocks, K, K] f64 on the device: inner products of every block's accumulated gradients over
  /// this rank's shards.
  at::Tensor inner_products() const;

  /// The direction of later scores <- `scale` times the accumulated gradient of objective k, in the
  /// compute dtype: one more shard of the trainable parameters. Collective; all ranks have
  /// exchanged scalars since their last pass, so that none is still reading the direction.
  void point_along_gradient(size_t k, double scale);
  /// Forward and backward of the cross-entropy of objective 0, the batch's only one, with scores in
  /// place of gradients: no weight gradient is computed, kept or reduced. Blocks and their
  /// directions are gathered together. Between begin_step and release_resident.
  TokenScores score_tokens(PackedBatch batch);

  /// Forward only. h [S, D]: final-normed hidden states of the scored rows.
  at::Tensor hidden(const PackedBatch& batch);
  /// Runs `use` with the output matrix gathered (and the reference's, where the head trains).
  void with_head(const std::function<void(Parameter& head, Parameter& reference_head)>& use);

 private:
  class GatherQueue;
  struct Kept;
  at::Tensor run_blocks(const PackedBatch& batch, GatherQueue& gathers, int64_t lowest_kept,
                        Kept* kept);
  std::vector<ShardedUnit*> gather_order(const std::vector<ShardedUnit*>& head, bool scores);
  at::Tensor head_forward_backward(const PackedBatch& batch, const at::Tensor& x,
                                   const std::vector<ShardedUnit*>& group, GatherQueue& gathers,
                                   PassSums& sums);
  void blocks_backward(const PackedBatch& batch, GatherQueue& gathers, Kept& kept, at::Tensor dx);
  void reduce_last();
  void score(const PackedBatch& batch, size_t objective, const at::Tensor& h, at::Tensor& dh,
             const at::Tensor& loss, const at::Tensor& row_scores);
  at::Tensor score_head(PackedBatch& batch, const at::Tensor& x, GatherQueue& gathers,
                        at::Tensor& log_p);
  std::vector<ShardedUnit*> group_of(const std::vector<size_t>& units, bool directions);
  std::vector<ShardedUnit*> head_group(bool directions = false);
  void append_scores(const PackedBatch& batch, PassSums& sums) const;
  Parameter& reference_head();

  CausalLM& model_;
  Mesh& mesh_;
  EngineOptions options_;
  Buffers buffers_;
  PhaseClock clock_;
  std::vector<ShardedUnit> units_;
  std::vector<std::string> blocks_;
  std::unique_ptr<Parameter> frozen_head_;  // p_ref's output matrix where the head trains
  std::unique_ptr<ShardedUnit> frozen_head_unit_;
  std::unique_ptr<Directions> directions_;  // of scores
  ShardedUnit* reducing_ = nullptr;         // its reduce-scatters are under way
  std::vector<size_t> active_;
  std::vector<size_t> computed_;  // objectives of this step, ascending
  bool first_ = true;
};

}  // namespace safegrad::dist
