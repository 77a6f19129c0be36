// audit.h: how much the gradient of every task sample by itself works against alignment.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "core/pack.h"
#include "dist/engine.h"
#include "dist/mesh.h"

namespace safegrad::dist {

/// One task sample; means over its response tokens.
struct AuditedSample {
  double score = 0;  ///< u·a / |a|, u the gradient of its loss; below 0 it works against alignment
  double loss = 0;   ///< cross-entropy
};

struct Audit {
  std::vector<AuditedSample> samples;  ///< by index in the task file; the same bits on every rank
  double align_loss = 0;               ///< of the alignment set, per response token
  double align_norm = 0;               ///< |a|
};

/// Told before each micro-batch: `done` of `all` have run.
using AuditProgress = std::function<void(int64_t done, int64_t all)>;

/// Scores every sample of `task` at the engine's weights, which stay as they are. a is the gradient
/// of the engine's objective `k` over the whole of `align`. One forward and backward over `align`,
/// then one over `task` in which each token's part of u·a is summed in place of gradients
/// (Engine::score_tokens); no gradient of a sample ever exists. Objective 0 of the engine is the
/// cross-entropy. Collective. Ends the job where a is zero or not finite.
Audit audit(Engine& engine, Mesh& mesh, const ObjectiveData& task, const ObjectiveData& align,
            size_t k, int64_t max_tokens, const AuditProgress& progress);

}  // namespace safegrad::dist
