#include "dist/probe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>

#include "core/head_loss.h"
#include "core/loss_rows.h"

namespace safegrad::dist {
namespace {

double log_add(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// Sums over ranks, in rank order: the same bits everywhere.
std::vector<double> sum_over_ranks(Communicator& world, const std::vector<double>& values) {
  const auto all = all_gather_doubles(world, values);
  std::vector<double> sum(values.size(), 0.0);
  for (size_t i = 0; i < all.size(); ++i) sum[i % values.size()] += all[i];
  return sum;
}

std::vector<double> row_log_probabilities(const at::Tensor& h, const at::Tensor& targets,
                                          const Parameter& head) {
  std::vector<double> result;
  for (int64_t begin = 0; begin < h.size(0); begin += kHeadChunk) {
    const int64_t rows = std::min(kHeadChunk, h.size(0) - begin);
    const at::Tensor logits = at::mm(h.narrow(0, begin, rows), head.value.t()).to(at::kFloat);
    const at::Tensor log_p = log_probabilities(logits, targets.narrow(0, begin, rows)).contiguous();
    result.insert(result.end(), log_p.const_data_ptr<double>(),
                  log_p.const_data_ptr<double>() + rows);
  }
  return result;
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

void Probe::judge_groups(const std::vector<int64_t>& groups, Engine& engine,
                         std::vector<double>& wins) const {
  const PackedChoices packed = pack_choices(groups, *file_, members_);
  const at::Tensor h = engine.hidden(packed.batch);
  std::vector<double> log_p;
  engine.with_head([&](Parameter& head, Parameter&) {
    log_p = row_log_probabilities(h, packed.batch.targets, head);
  });
  std::map<int64_t, double> candidate;  // log-likelihood of each sequence of the file
  for (size_t i = 0; i < log_p.size(); ++i) candidate[packed.candidates[i]] += log_p[i];
  for (int64_t group : groups) {
    std::vector<double> score(file_->classes().size(), -std::numeric_limits<double>::infinity());
    for (int64_t sequence : members_[static_cast<size_t>(group)]) {
      double& class_score = score[static_cast<size_t>(file_->choice(sequence))];
      class_score = log_add(class_score, candidate[sequence]);
    }
    wins[static_cast<size_t>(std::max_element(score.begin(), score.end()) - score.begin())] += 1;
  }
}

std::map<std::string, double> Probe::run_choices(Engine& engine, Mesh& mesh,
                                                 int64_t max_tokens) const {
  Stream stream;
  stream.lengths = group_lengths(*file_);
  stream.scored.assign(members_.size(), 0);
  stream.per_step = static_cast<int64_t>(members_.size());
  const StepPlan plan = Planner({stream}, mesh.world().size(), max_tokens, 0, 0, 0.0).plan(0);
  std::vector<double> wins(file_->classes().size(), 0.0);
  for (const auto& micro_batch : plan.assignment) {
    std::vector<int64_t> groups;
    for (const Draw& draw : micro_batch[static_cast<size_t>(mesh.world().rank())])
      groups.push_back(draw.sample);
    judge_groups(groups, engine, wins);
  }
  wins = sum_over_ranks(mesh.world(), wins);
  std::map<std::string, double> shares;
  for (size_t c = 0; c < wins.size(); ++c) {
    shares[file_->classes()[c]] = wins[c] / static_cast<double>(members_.size());
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
  std::vector<double> sums(2, 0.0);  // cross-entropy, KL
  for (const auto& micro_batch : plan.assignment) {
    const PackedBatch batch =
        pack(micro_batch[static_cast<size_t>(mesh.world().rank())], {data}, {});
    const at::Tensor h = engine.hidden(batch);
    engine.with_head([&](Parameter& head, Parameter& reference_head) {
      sums[0] += cross_entropy_head(h, batch.targets, head, 0, {});
      if (reference_)
        sums[1] += kl_head(h, batch.reference_hidden, head, reference_head.value, 0, {});
    });
  }
  sums = sum_over_ranks(mesh.world(), sums);
  const auto scored = static_cast<double>(file_->total_scored());
  std::map<std::string, double> measures = {{"loss", sums[0] / scored}};
  if (reference_) measures["kl"] = sums[1] / scored;
  return measures;
}

}  // namespace safegrad::dist
