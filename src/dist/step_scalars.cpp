#include "dist/step_scalars.h"

#include <algorithm>
#include <cmath>

namespace safegrad::dist {
namespace {

void to_means(Gram& gram, const std::vector<double>& tokens) {
  for (size_t i = 0; i < gram.size; ++i) {
    for (size_t j = 0; j < gram.size; ++j) gram.at(i, j) /= tokens[i] * tokens[j];
  }
}

}  // namespace

// Every rank's values are summed in rank order, so that all ranks hold the same bits. Inner
// products are summed over the ranks of one replica (replicas hold the same shards), losses over
// all ranks. The notices travel along, so that a request to one rank is everybody's at the same
// step, and the memory that each rank has held.
StepScalars exchange_scalars(Engine& engine, Mesh& mesh, const PassSums& sums,
                             const at::Tensor& block_grams, bool per_block, const Notice& own,
                             int64_t score_slots) {
  const auto memory = static_cast<double>(engine.backend().peak_bytes());
  const at::Tensor host = engine.backend().upload(
      at::tensor({sums.flops, own.stop ? 1.0 : 0.0, own.writing ? 1.0 : 0.0, memory}, at::kDouble));
  std::vector<at::Tensor> parts = {sums.loss, host, block_grams.sum(0).flatten()};
  if (per_block) parts.push_back(block_grams.flatten());
  const int64_t slots = sums.scores.defined() ? score_slots : 0;
  if (slots > 0)
    parts.push_back(at::constant_pad_nd(sums.scores, {0, slots - sums.scores.size(0)}));
  const at::Tensor values = at::cat(parts);

  engine.clock().enter(Phase::wait);
  const std::vector<double> all = mesh.world().all_gather_scalars(values);
  engine.clock().enter(Phase::surgery);
  const auto row = static_cast<size_t>(values.numel()), n = row - static_cast<size_t>(slots);
  const size_t k = engine.objectives(), per_gram = k * k;
  const size_t grams = k + 4;  // before them: losses, flops, the notice, the memory; after: scores
  std::vector<double> sum(n, 0.0);
  for (int r = 0; r < mesh.world().size(); ++r) {
    for (size_t i = 0; i < n; ++i) {
      if (i < grams || r < mesh.shards()) sum[i] += all[static_cast<size_t>(r) * row + i];
    }
  }
  StepScalars scalars;
  for (size_t i = k + 3; i < all.size(); i += row)
    scalars.memory_bytes = std::max(scalars.memory_bytes, static_cast<int64_t>(all[i]));
  scalars.loss.assign(sum.begin(), sum.begin() + static_cast<std::ptrdiff_t>(k));
  scalars.flops = sum[k];
  scalars.notice = {sum[k + 1] > 0, sum[k + 2] > 0};
  scalars.finite = std::all_of(sum.begin(), sum.end(), [](double v) { return std::isfinite(v); });
  auto next_gram = [&, next = grams]() mutable {
    Gram gram(k);
    for (double& value : gram.values) value = sum[next++];
    return gram;
  };
  scalars.gram = next_gram();
  for (size_t left = n - grams - per_gram; left > 0; left -= per_gram)
    scalars.block_grams.push_back(next_gram());
  for (size_t i = 0; i < all.size(); ++i) {
    if (i % row >= n) scalars.scores.push_back(all[i]);
  }
  return scalars;
}

void to_means(StepScalars& scalars, const std::vector<double>& tokens) {
  to_means(scalars.gram, tokens);
  for (Gram& block : scalars.block_grams) to_means(block, tokens);
}

}  // namespace safegrad::dist
