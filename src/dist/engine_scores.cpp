// engine_scores.cpp: the engine's pass with scores in place of gradients.
#include <algorithm>
#include <utility>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/head_loss.h"
#include "dist/directions.h"
#include "dist/engine.h"
#include "dist/engine_schedule.h"

namespace safegrad::dist {

void Engine::point_along_gradient(size_t k, double scale) {
  if (!directions_)
    directions_ = std::make_unique<Directions>(model_, options_.sharding, mesh_, buffers_);
  // A rank may still be reading the last direction out of this one's memory.
  mesh_.shard_group().barrier();
  for (size_t u = 0; u < units_.size(); ++u) {
    if (ShardedUnit* direction = directions_->of(u))
      direction->set_frozen(units_[u].gradient_shard(k).mul(scale));
  }
  mesh_.shard_group().finish_shard_writes();
}

// Each unit, then its direction.
std::vector<ShardedUnit*> Engine::with_directions(const std::vector<size_t>& units) {
  std::vector<ShardedUnit*> all;
  for (size_t u : units) {
    all.push_back(&units_[u]);
    if (directions_->of(u)) all.push_back(directions_->of(u));
  }
  return all;
}

// dx [T, D] of the last block's output.
at::Tensor Engine::score_head(PackedBatch& batch, const at::Tensor& x, GatherQueue& gathers,
                              at::Tensor& log_p) {
  const auto group = with_directions(model_.head_units());
  gathers.next(group.size());
  clock_.enter(Phase::head);
  const at::Tensor x_scored = x.index_select(0, batch.scored);
  const at::Tensor h = model_.final_norm(x_scored);
  const at::Tensor dh = at::empty_like(h);
  const at::Tensor row_scores = at::zeros({h.size(0)}, batch.token_scores.options());
  log_p = cross_entropy_head_scores(kernels(), h, batch.targets, model_.head(), dh, row_scores);
  batch.token_scores.index_add_(0, batch.scored, row_scores);
  at::Tensor dx = at::zeros_like(x);
  dx.index_copy_(0, batch.scored, model_.final_norm_backward(x_scored, dh, batch));
  for (ShardedUnit* unit : group) unit->release();
  return dx;
}

void Engine::score_blocks(const PackedBatch& batch, GatherQueue& gathers, Kept& kept,
                          at::Tensor dx) {
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  for (int64_t b = model_.blocks() - 1; b >= lowest; --b) {
    const auto group = with_directions({model_.block_unit(b)});
    gathers.next(group.size());
    clock_.enter(Phase::backward);
    auto& activations = kept.activations[static_cast<size_t>(b)];
    at::Tensor& input = kept.inputs[static_cast<size_t>(b)];
    if (!activations) model_.forward_block(b, input, batch, &activations);
    input.reset();
    const bool need_dx = b > lowest || model_.lowest_trainable_block() < 0;
    dx = model_.backward_block(b, std::move(activations), std::move(dx), batch, need_dx);
    for (ShardedUnit* unit : group) unit->release();
  }
  if (model_.lowest_trainable_block() >= 0) return;
  gathers.next();
  clock_.enter(Phase::backward);
  model_.embed_backward(batch, dx);
  directions_->of(model_.embedding_unit())->release();
}

TokenScores Engine::score_tokens(PackedBatch batch) {
  SAFEGRAD_CHECK(directions_, UsageError, "score_tokens before point_along_gradient");
  SAFEGRAD_CHECK(batch.objectives() == 1, UsageError,
                 "score_tokens: got a batch of {} objectives, it takes one", batch.objectives());
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  std::vector<ShardedUnit*> order = {&units_[model_.embedding_unit()]};
  auto append = [&order](const std::vector<ShardedUnit*>& more) {
    order.insert(order.end(), more.begin(), more.end());
  };
  for (int64_t b = 0; b < model_.blocks(); ++b) order.push_back(&units_[model_.block_unit(b)]);
  append(with_directions(model_.head_units()));
  for (int64_t b = model_.blocks() - 1; b >= lowest; --b)
    append(with_directions({model_.block_unit(b)}));
  if (model_.lowest_trainable_block() < 0)
    order.push_back(directions_->of(model_.embedding_unit()));
  ShardedUnit* const adapters = model_.adapter_unit() < 0
                                    ? nullptr
                                    : directions_->of(static_cast<size_t>(model_.adapter_unit()));
  if (adapters) adapters->finish_gather();
  GatherQueue gathers(std::move(order), clock_);

  batch.token_scores =
      at::zeros({batch.size()}, at::TensorOptions().dtype(at::kDouble).device(backend().device()));
  Kept kept(model_.blocks());
  at::Tensor x = run_blocks(batch, gathers, lowest, &kept);
  TokenScores result;
  at::Tensor dx = score_head(batch, x, gathers, result.log_p);
  x.reset();
  score_blocks(batch, gathers, kept, std::move(dx));
  if (adapters) adapters->release();
  clock_.enter(Phase::other);
  result.scores = batch.token_scores;
  return result;
}

}  // namespace safegrad::dist
