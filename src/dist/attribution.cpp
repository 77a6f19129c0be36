#include "dist/attribution.h"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

namespace safegrad::dist {
namespace {

// Samples of an objective in the plan, of these ranks alone if there are any.
std::vector<int64_t> samples_of(const StepPlan& plan, size_t objective,
                                const std::vector<int>& ranks) {
  std::vector<int64_t> samples;
  for (const auto& micro_batch : plan.assignment) {
    for (size_t r = 0; r < micro_batch.size(); ++r) {
      const bool asked = ranks.empty() ||
                         std::find(ranks.begin(), ranks.end(), static_cast<int>(r)) != ranks.end();
      for (const Draw& draw : micro_batch[r]) {
        if (asked && draw.objective == objective) samples.push_back(draw.sample);
      }
    }
  }
  std::sort(samples.begin(), samples.end());
  samples.erase(std::unique(samples.begin(), samples.end()), samples.end());
  return samples;
}

}  // namespace

// A gradient's square is enough: products of finite floats are finite in f64, so a mixed product is
// broken only where one of the two gradients is.
NotFinite attribute(Mesh& mesh, const at::Tensor& loss, const at::Tensor& block_grams,
                    const std::vector<std::string>& blocks, const StepPlan& plan) {
  const at::Tensor squares = block_grams.diagonal(0, 1, 2);  // [blocks, K]
  const at::Tensor values = at::cat({loss, squares.flatten()});
  const std::vector<double> all = mesh.world().all_gather_scalars(values);
  const auto n = static_cast<size_t>(values.numel()), k = static_cast<size_t>(loss.numel());
  auto broken = [&](int r, size_t i) {
    return !std::isfinite(all[static_cast<size_t>(r) * n + i]);
  };

  NotFinite what;
  for (size_t o = 0; o < k; ++o) {
    for (int r = 0; r < mesh.world().size(); ++r) {
      if (broken(r, o)) what.losses[kObjectiveNames[o]].push_back(r);
    }
  }
  std::vector<bool> suspect(k, false);
  for (size_t b = 0; b < blocks.size(); ++b) {
    std::vector<std::string> objectives;
    for (size_t o = 0; o < k; ++o) {
      bool any = false;
      for (int r = 0; r < mesh.shards(); ++r) any = any || broken(r, k + b * k + o);
      if (any) objectives.push_back(kObjectiveNames[o]);
      suspect[o] = suspect[o] || any;
    }
    if (!objectives.empty()) what.blocks.emplace_back(blocks[b], std::move(objectives));
  }
  for (size_t o = 0; o < k; ++o) {
    const auto found = what.losses.find(kObjectiveNames[o]);
    const bool by_loss = found != what.losses.end();
    if (by_loss || suspect[o]) {
      what.samples[kObjectiveNames[o]] =
          samples_of(plan, o, by_loss ? found->second : std::vector<int>());
    }
  }
  return what;
}

}  // namespace safegrad::dist
