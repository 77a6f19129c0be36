#include "dist/audit.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <ATen/ATen.h>

#include "core/error.h"
#include "dist/run_shape.h"

namespace safegrad::dist {
namespace {

// The micro-batches of this rank over both sets, which all ranks go through together.
class Passes {
 public:
  Passes(Engine& engine, Mesh& mesh, int64_t max_tokens, const AuditProgress& progress,
         const ObjectiveData& align, const ObjectiveData& task)
      : align(plan_all(align, mesh.world().size(), max_tokens)),
        task(plan_all(task, mesh.world().size(), max_tokens)),
        engine_(engine),
        mesh_(mesh),
        rank_(static_cast<size_t>(mesh.world().rank())),
        progress_(progress) {}

  const StepPlan align, task;

  /// Calls body(batch, draws) for each; the draws are of the last of `objectives`.
  template <typename Body>
  void run(const StepPlan& plan, const std::vector<ObjectiveData>& objectives, const Body& body) {
    engine_.begin_step();
    for (const auto& micro_batch : plan.assignment) {
      if (progress_)
        progress_(done_++, static_cast<int64_t>(align.assignment.size() + task.assignment.size()));
      std::vector<Draw> draws = micro_batch[rank_];
      for (Draw& draw : draws) draw.objective = objectives.size() - 1;
      body(upload(pack(draws, objectives, {}), engine_.backend()), draws);
      // Replicas share no collective here: what they are apart would add up to a watchdog's alarm.
      mesh_.world().barrier();
    }
  }

 private:
  Engine& engine_;
  Mesh& mesh_;
  size_t rank_;
  const AuditProgress& progress_;
  int64_t done_ = 0;
};

// Leaves the alignment set's summed gradient in the engine; fills loss and norm of its mean.
void sum_alignment(Engine& engine, Mesh& mesh, const ObjectiveData& align, size_t k, Passes& passes,
                   Audit& result) {
  PassSums sums = engine.zero_sums();
  std::vector<ObjectiveData> objectives(k + 1, align);
  bool first = true;
  passes.run(passes.align, objectives, [&](const PackedBatch& batch, const std::vector<Draw>&) {
    engine.forward_backward(batch, {k}, first, sums);
    first = false;
  });
  engine.end_step();
  const auto index = static_cast<int64_t>(k);
  const at::Tensor square = engine.inner_products().sum(0)[index][index];
  const std::vector<double> all =
      mesh.world().all_gather_scalars(at::stack({sums.loss[index], square}));
  double loss = 0, sum = 0;
  for (int r = 0; r < mesh.world().size(); ++r) {
    loss += all[2 * static_cast<size_t>(r)];
    if (r < mesh.shards()) sum += all[2 * static_cast<size_t>(r) + 1];  // replicas hold the same
  }
  const auto scored = static_cast<double>(align.file->total_scored());
  result.align_loss = loss / scored;
  result.align_norm = std::sqrt(sum) / scored;
  agree(mesh.world(), [&] {
    SAFEGRAD_CHECK(
        std::isfinite(result.align_norm) && result.align_norm > 0, RunError,
        "audit: the gradient of the alignment set {} has norm {} at loss {}; it must be "
        "finite and above 0. A KL has none at the start model: take more --steps; a loss "
        "that is not finite: fewer, or a lower optimizer.lr",
        align.file->path(), result.align_norm, result.align_loss);
  });
}

// Each sample's sums over its tokens and over its scored rows, as means: score, loss, score, loss …
void append_samples(const TokenScores& found, const PackedBatch& batch,
                    const std::vector<Draw>& draws, const ObjectiveData& task,
                    std::vector<double>& values) {
  const at::Tensor scores = found.scores.cpu(), log_p = found.log_p.cpu();
  int64_t row = 0;
  for (size_t i = 0; i < draws.size(); ++i) {
    const int64_t begin = batch.cu_seqlens[i], end = batch.cu_seqlens[i + 1];
    const int64_t rows = task.file->scored(draws[i].sample);
    const auto n = static_cast<double>(rows);
    values.push_back(scores.narrow(0, begin, end - begin).sum().item<double>() / n);
    values.push_back(-log_p.narrow(0, row, rows).sum().item<double>() / n);
    row += rows;
  }
}

// Every rank's values, in the order of its draws, to their samples.
std::vector<AuditedSample> exchange(Mesh& mesh, const StepPlan& plan, int64_t samples,
                                    std::vector<double> values) {
  const std::vector<std::vector<int64_t>> drawn = samples_by_rank(plan, 0);
  size_t most = 0;
  for (const auto& list : drawn) most = std::max(most, list.size());
  values.resize(2 * most, 0.0);
  const std::vector<double> all = all_gather_doubles(mesh.world(), values);
  std::vector<AuditedSample> result(static_cast<size_t>(samples));
  for (size_t r = 0; r < drawn.size(); ++r) {
    for (size_t i = 0; i < drawn[r].size(); ++i) {
      const double* pair = all.data() + 2 * (r * most + i);
      result[static_cast<size_t>(drawn[r][i])] = {pair[0], pair[1]};
    }
  }
  return result;
}

}  // namespace

Audit audit(Engine& engine, Mesh& mesh, const ObjectiveData& task, const ObjectiveData& align,
            size_t k, int64_t max_tokens, const AuditProgress& progress) {
  Audit result;
  mesh.world().about("audit");
  Passes passes(engine, mesh, max_tokens, progress, align, task);
  sum_alignment(engine, mesh, align, k, passes, result);
  const auto scored = static_cast<double>(align.file->total_scored());
  engine.point_along_gradient(k, 1.0 / (result.align_norm * scored));  // of length 1
  std::vector<double> values;
  passes.run(passes.task, {task}, [&](const PackedBatch& batch, const std::vector<Draw>& draws) {
    append_samples(engine.score_tokens(batch), batch, draws, task, values);
  });
  engine.release_resident();
  result.samples = exchange(mesh, passes.task, task.file->size(), std::move(values));
  return result;
}

}  // namespace safegrad::dist
