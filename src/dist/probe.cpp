#include "dist/probe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>

#include "core/head_loss.h"

namespace safegrad::dist {
namespace {

double log_add(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// Sums what ranks gathered from each other, in rank order: the same bits everywhere.
std::vector<double> sum_over_ranks(const Communicator& world, const std::vector<double>& all) {
  std::vector<double> sum(all.size() / static_cast<size_t>(world.size()), 0.0);
  for (size_t i = 0; i < all.size(); ++i) sum[i % sum.size()] += all[i];
  return sum;
}

}  // namespace

Probe::Probe(std::string name, std::shared_ptr<const TokenFile> file,
             std::shared_ptr<const ReferenceCache> reference, int64_t every_steps)
    : name_(std::move(name)),
      file_(std::move(file)),
      reference_(std::move(reference)),
      every_steps_(every_steps) {
  if (!file_->has_choices()) return;
  members_.resize(static_cast<size_t>(file_->groups()));
  for (int64_t i = 0; i < file_->size(); ++i)
    members_[static_cast<size_t>(file_->group(i))].push_back(i);
}

std::map<std::string, double> Probe::run(Engine& engine, Mesh& mesh, int64_t max_tokens) const {
  return file_->has_choices() ? run_choices(engine, mesh, max_tokens)
                              : run_likelihood(engine, mesh, max_tokens);
}

// Adds to `counts`: for each class the groups that it wins by likelihood, then for each class the
// groups whose greedy reply begins with one of its candidates.
void Probe::judge_groups(const std::vector<int64_t>& groups, Engine& engine,
                         std::vector<double>& counts) const {
  PackedChoices packed = pack_choices(groups, *file_, members_);
  const PackedBatch batch = upload(std::move(packed.batch), engine.backend());
  const at::Tensor h = engine.hidden(batch);
  at::Tensor log_p, greedy;
  engine.with_head([&](Parameter& head, Parameter&) {
    const ScoredRows rows = score_rows(engine.kernels(), h, batch.targets, head.value);
    log_p = rows.log_p.cpu();
    greedy = rows.greedy.cpu();
  });
  struct Candidate {
    double log_p = 0;
    bool greedy = true;
  };
  std::map<int64_t, Candidate> candidates;  // by sequence of the file
  for (size_t i = 0; i < packed.candidates.size(); ++i) {
    Candidate& candidate = candidates[packed.candidates[i]];
    candidate.log_p += log_p.const_data_ptr<double>()[i];
    candidate.greedy = candidate.greedy && greedy.const_data_ptr<bool>()[i];
  }
  const size_t classes = file_->classes().size();
  for (int64_t group : groups) {
    std::vector<double> score(classes, -std::numeric_limits<double>::infinity());
    std::vector<bool> would_say(classes, false);
    for (int64_t sequence : members_[static_cast<size_t>(group)]) {
      const auto c = static_cast<size_t>(file_->choice(sequence));
      score[c] = log_add(score[c], candidates[sequence].log_p);
      if (candidates[sequence].greedy) would_say[c] = true;
    }
    // A tie, or a number that is not finite, is nobody's.
    const auto best = std::max_element(score.begin(), score.end());
    const bool valid =
        std::none_of(score.begin(), score.end(), [](double s) { return std::isnan(s); });
    if (valid && std::count(score.begin(), score.end(), *best) == 1)
      counts[static_cast<size_t>(best - score.begin())] += 1;
    for (size_t c = 0; c < classes; ++c) counts[classes + c] += would_say[c];
  }
}

std::map<std::string, double> Probe::run_choices(Engine& engine, Mesh& mesh,
                                                 int64_t max_tokens) const {
  Stream stream;
  stream.lengths = group_lengths(*file_);
  stream.scored.assign(members_.size(), 0);
  stream.per_step = static_cast<int64_t>(members_.size());
  const StepPlan plan = Planner({stream}, mesh.world().size(), max_tokens, 0, 0, 0.0).plan(0);
  const std::vector<std::string>& classes = file_->classes();
  std::vector<double> counts(2 * classes.size(), 0.0);
  for (const auto& micro_batch : plan.assignment) {
    std::vector<int64_t> groups;
    for (const Draw& draw : micro_batch[static_cast<size_t>(mesh.world().rank())])
      groups.push_back(draw.sample);
    judge_groups(groups, engine, counts);
  }
  counts = sum_over_ranks(mesh.world(), all_gather_doubles(mesh.world(), counts));
  const auto groups = static_cast<double>(members_.size());
  std::map<std::string, double> shares;
  for (size_t c = 0; c < classes.size(); ++c) {
    shares[classes[c]] = counts[c] / groups;
    shares["greedy_" + classes[c]] = counts[classes.size() + c] / groups;
  }
  return shares;
}

std::map<std::string, double> Probe::run_likelihood(Engine& engine, Mesh& mesh,
                                                    int64_t max_tokens) const {
  ObjectiveData data{file_.get(), false, {}};
  if (reference_) data.reference = [&](int64_t sample) { return reference_->rows(sample); };
  Stream stream;
  for (int64_t i = 0; i < file_->size(); ++i) {
    stream.lengths.push_back(file_->length(i));
    stream.scored.push_back(file_->scored(i));
  }
  stream.per_step = file_->size();
  const StepPlan plan = Planner({stream}, mesh.world().size(), max_tokens, 0, 0, 0.0).plan(0);
  at::Tensor sums = at::zeros({2}, at::TensorOptions()
                                       .dtype(at::kDouble)
                                       .device(engine.backend().device()));  // cross-entropy, KL
  for (const auto& micro_batch : plan.assignment) {
    const PackedBatch batch = upload(
        pack(micro_batch[static_cast<size_t>(mesh.world().rank())], {data}, {}), engine.backend());
    const at::Tensor h = engine.hidden(batch);
    engine.with_head([&](Parameter& head, Parameter& reference_head) {
      const Kernels& kernels = engine.kernels();
      cross_entropy_head(kernels, h, batch.targets, head, 0, {}, sums.narrow(0, 0, 1));
      if (!reference_) return;
      kl_head(kernels, h, batch.reference_hidden, head, reference_head.value, 0, {},
              sums.narrow(0, 1, 1));
    });
  }
  const auto totals = sum_over_ranks(mesh.world(), mesh.world().all_gather_scalars(sums));
  const auto scored = static_cast<double>(file_->total_scored());
  std::map<std::string, double> measures = {{"loss", totals[0] / scored}};
  if (reference_) measures["kl"] = totals[1] / scored;
  return measures;
}

}  // namespace safegrad::dist
