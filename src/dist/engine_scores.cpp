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
  for (size_t u = 0; u < units_.size(); ++u) {
    if (ShardedUnit* direction = directions_->of(u))
      direction->set_frozen(units_[u].gradient_shard(k).mul(scale));
  }
  mesh_.shard_group().finish_shard_writes();
}

// Each unit, then its direction where it has one and `directions` are wanted.
std::vector<ShardedUnit*> Engine::group_of(const std::vector<size_t>& units, bool directions) {
  std::vector<ShardedUnit*> all;
  for (size_t u : units) {
    all.push_back(&units_[u]);
    if (directions && directions_->of(u)) all.push_back(directions_->of(u));
  }
  return all;
}

// In the order of the sequences; sums over tokens in one order, so with the same bits every time.
void Engine::append_scores(const PackedBatch& batch, PassSums& sums) const {
  std::vector<at::Tensor> scores = {sums.scores};
  for (size_t i = 0; batch.cu_seqlens[i] < batch.segments[1]; ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    scores.push_back(batch.token_scores.narrow(0, begin, end - begin).sum().view({1}));
  }
  sums.scores = at::cat(scores);
}

// dx [T, D] of the last block's output.
at::Tensor Engine::score_head(PackedBatch& batch, const at::Tensor& x, GatherQueue& gathers,
                              at::Tensor& log_p) {
  const auto group = group_of(model_.head_units(), true);
  gathers.next(group.size());
  clock_.enter(Phase::head);
  const at::Tensor x_scored = x.index_select(0, batch.scored);
  const at::Tensor h = model_.final_norm(x_scored);
  const at::Tensor dh = at::empty_like(h);
  const at::Tensor row_scores = at::zeros({h.size(0)}, batch.token_scores.options());
  log_p = cross_entropy_head_scores(kernels(), h, batch.targets, model_.head(), dh, row_scores);
  add_row_scores(batch, row_scores);
  at::Tensor dx = at::zeros_like(x);
  dx.index_copy_(0, batch.scored, model_.final_norm_backward(x_scored, dh, batch));
  for (ShardedUnit* unit : group) unit->release();
  return dx;
}

TokenScores Engine::score_tokens(PackedBatch batch) {
  SAFEGRAD_CHECK(directions_, UsageError, "score_tokens before point_along_gradient");
  SAFEGRAD_CHECK(batch.objectives() == 1, UsageError,
                 "score_tokens: got a batch of {} objectives, it takes one", batch.objectives());
  const int64_t lowest = std::max<int64_t>(0, model_.lowest_trainable_block());
  ShardedUnit* const adapters = model_.adapter_unit() < 0
                                    ? nullptr
                                    : directions_->of(static_cast<size_t>(model_.adapter_unit()));
  if (adapters) adapters->finish_gather();
  GatherQueue gathers(gather_order(group_of(model_.head_units(), true), true), clock_);

  batch.token_scores =
      at::zeros({batch.size()}, at::TensorOptions().dtype(at::kDouble).device(backend().device()));
  Kept kept(model_.blocks());
  at::Tensor x = run_blocks(batch, gathers, lowest, &kept);
  TokenScores result;
  at::Tensor dx = score_head(batch, x, gathers, result.log_p);
  x.reset();
  active_.clear();  // no objective's gradient
  blocks_backward(batch, gathers, kept, std::move(dx));
  reducing_ = nullptr;
  if (adapters) adapters->release();
  clock_.enter(Phase::other);
  result.scores = batch.token_scores;
  return result;
}

}  // namespace safegrad::dist
