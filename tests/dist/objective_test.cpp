// objective_test.cpp: what is made of the two gradients over several steps, against plain loops in
// float64 that keep weights and moments of their own.
#include <algorithm>
#include <cmath>
#include <map>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dist/rank_main.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

constexpr int64_t kSteps = 8;

using Vector = std::vector<double>;

void append(const at::Tensor& from, int64_t n, Vector& to) {
  const at::Tensor flat = from.cpu();
  to.insert(to.end(), flat.const_data_ptr<float>(), flat.const_data_ptr<float>() + n);
}

// The trainable elements of all units one behind the other, of a job on one shard.
Vector masters(TinyJob& job) {
  Vector all;
  for (const dist::ShardedUnit& unit : job.trainer->engine().units()) {
    if (!unit.trains()) continue;
    const auto state = unit.state();
    append(state.tensors[0], state.numel, all);
  }
  return all;
}

Vector gradient(TinyJob& job, size_t k, double tokens) {
  Vector all;
  for (const dist::ShardedUnit& unit : job.trainer->engine().units()) {
    if (unit.trains()) append(unit.gradient_shard(k), unit.state().numel, all);
  }
  for (double& g : all) g /= tokens;
  return all;
}

double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// AdamW as in its paper, without weight decay and with the config's clipping.
class PlainAdamW {
 public:
  PlainAdamW(Vector weights, const OptimizerSection& o)
      : weights_(std::move(weights)), m_(weights_.size(), 0), v_(weights_.size(), 0), o_(o) {}

  void step(const Vector& g) {
    ++t_;
    const double clip =
        o_.clip_norm > 0 ? std::min(1.0, o_.clip_norm / (std::sqrt(dot(g, g)) + 1e-6)) : 1.0;
    const auto [b1, b2] = o_.betas;
    for (size_t i = 0; i < g.size(); ++i) {
      m_[i] = b1 * m_[i] + (1 - b1) * clip * g[i];
      v_[i] = b2 * v_[i] + (1 - b2) * clip * clip * g[i] * g[i];
      const double root = std::sqrt(v_[i] / (1 - std::pow(b2, t_)));
      weights_[i] -= o_.lr * m_[i] / (1 - std::pow(b1, t_)) / (root + o_.eps);
    }
  }
  const Vector& weights() const { return weights_; }

 private:
  Vector weights_, m_, v_;
  OptimizerSection o_;
  int t_ = 0;
};

/// A shared folder with data, and jobs of one rank or of all.
class Objectives : public ::testing::Test {
 protected:
  Objectives() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  /// Full fine-tuning against the KL, or adapters against the alignment responses. The seeds' order
  /// of samples has conflicts in both.
  RunConfig config(bool lora) {
    RunConfig c = tiny_config("llama3", folder_.path());
    // AdamW divides by sqrt(v): where a gradient is about eps it would enlarge float32's rounding.
    c.optimizer.eps = 1e-5;
    if (lora) {
      c.model.trainable.clear();
      c.model.lora = LoraConfig{.rank = 4, .alpha = 8, .targets = {"q_proj", "down_proj"}};
      c.objective.align_loss = AlignLoss::sft;
      c.optimizer.lr = 1e-2;
    }
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
    return c;
  }
  std::unique_ptr<TinyJob> alone(RunConfig c) {
    c.parallel.shards = 1;
    c.output += std::to_string(all_->rank());
    return std::make_unique<TinyJob>(c, all_->split(all_->rank()));
  }
  void expect_the_same_on_every_layout(const RunConfig& base,
                                       const std::vector<StepRecord>& reference) {
    for (int64_t shards = 1; shards <= all_->size(); ++shards) {
      if (all_->size() % shards != 0) continue;
      SCOPED_TRACE("shards " + std::to_string(shards));
      RunConfig c = base;
      c.parallel.shards = shards;
      TinyJob job(c, world());
      const auto records = job.run(0, kSteps);
      for (size_t i = 0; i < records.size(); ++i) {
        // Float32 gradients summed in another order; 1e-5 is the promise, a KL near 0 a difference.
        ASSERT_EQ(std::isnan(records[i].loss_task), std::isnan(reference[i].loss_task));
        ASSERT_EQ(records[i].loss_align.has_value(), reference[i].loss_align.has_value());
        if (!std::isnan(reference[i].loss_task)) {
          EXPECT_NEAR(records[i].loss_task / reference[i].loss_task, 1.0, 1e-5) << "step " << i;
        }
        if (reference[i].loss_align) {
          EXPECT_NEAR(*records[i].loss_align, *reference[i].loss_align,
                      1e-3 * *reference[i].loss_align + 1e-9)
              << "step " << i;
        }
        EXPECT_EQ(records[i].align_renewed, reference[i].align_renewed);
      }
    }
  }
  // Scored tokens of the sequences that a stream gives its `draw`-th time.
  static double scored(const RunConfig& c, size_t k, int64_t draw) {
    std::vector<std::string> warnings;
    const TokenFile file(k == 0 ? c.data.task : c.data.align, {}, warnings);
    const int64_t n = file.size();
    const int64_t take = k == 0 ? c.batch.task_sequences : c.batch.align_sequences;
    double tokens = 0;
    for (int64_t p = draw * take; p < (draw + 1) * take; ++p) {
      const auto order = epoch_order(n, c.train.seed, k, p / n);
      tokens += static_cast<double>(file.scored(order[static_cast<size_t>(p % n)]));
    }
    return tokens;
  }
  // Rounding of float32 weights and of moments, in each of the steps.
  static void expect_weights(TinyJob& job, const PlainAdamW& plain, const Vector& start) {
    const Vector found = masters(job);
    double worst = 0, moved = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      worst = std::max(worst, std::abs(found[i] - plain.weights()[i]));
      moved = std::max(moved, std::abs(found[i] - start[i]));
    }
    ASSERT_GT(moved, 2 * job.config.optimizer.lr) << "the case must move";
    EXPECT_LT(worst, 1e-3 * job.config.optimizer.lr);
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

TEST_F(Objectives, BetweenRenewalsTheLastAlignmentGradientIsUsedAgain) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "lora" : "full");
    RunConfig c = config(lora);
    c.objective.align_every = 3;
    const bool kl = c.objective.align_loss == AlignLoss::kl;
    const auto job = alone(c);
    const Vector start = masters(*job);
    PlainAdamW plain(start, c.optimizer);
    Vector a;
    std::vector<StepRecord> records;
    int conflicts_between = 0;
    for (int64_t step = 0; step < kSteps; ++step) {
      const StepRecord record = job->trainer->step(step);
      records.push_back(record);
      const bool renews = step % 3 == 0 || (kl && step == 1);  // the KL's is zero in step 0
      const Vector u = gradient(*job, 0, scored(c, 0, step));
      const Vector now = gradient(*job, 1, scored(c, 1, step / 3));
      if (renews) {
        EXPECT_NE(now, a);
        a = now;
      } else {
        ASSERT_EQ(now, a) << "step " << step;
        EXPECT_EQ(record.align_tokens, 0);
        EXPECT_EQ(*record.loss_align, *records[static_cast<size_t>(step - 1)].loss_align);
        conflicts_between += record.conflict;
      }
      EXPECT_EQ(record.align_renewed, renews);
      const double ua = dot(u, a), aa = dot(a, a);
      EXPECT_NEAR(*record.ua, ua, 1e-9 * std::sqrt(dot(u, u) * aa)) << "step " << step;
      const double c_a = c.objective.rho + (aa > 1e-9 ? -std::min(ua, 0.0) / aa : 0.0);
      Vector g = u;
      for (size_t i = 0; i < g.size(); ++i) g[i] += c_a * a[i];
      plain.step(g);
    }
    ASSERT_GT(conflicts_between, 0);
    expect_weights(*job, plain, start);
    expect_the_same_on_every_layout(c, records);
  }
}

// The prefix of a parameter's Hugging Face name says which block it is in.
std::string block_of(const std::string& parameter) {
  const std::string layers = "model.layers.";
  if (!parameter.starts_with(layers))
    return parameter == "model.embed_tokens.weight" ? "embedding" : "head";
  return "block " +
         parameter.substr(layers.size(), parameter.find('.', layers.size()) - layers.size());
}

/// Block of every trainable element, in the order of masters().
std::vector<std::string> blocks_of(TinyJob& job) {
  std::vector<std::string> blocks;
  for (const dist::ShardedUnit& unit : job.trainer->engine().units()) {
    for (const Parameter* p : unit.unit().parameters) {
      if (p->trainable)
        blocks.insert(blocks.end(), static_cast<size_t>(p->numel()), block_of(p->name));
    }
  }
  return blocks;
}

TEST_F(Objectives, LayerWiseSurgeryIsTheRuleInEveryBlockWithOneClipping) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "lora" : "full");
    RunConfig c = config(lora);
    c.objective.surgery = Surgery::block;
    c.objective.gram_per_block = true;
    c.objective.rho = 0.5;
    c.optimizer.clip_norm = 0.5;
    const auto job = alone(c);
    const Vector start = masters(*job);
    const std::vector<std::string> blocks = blocks_of(*job);
    PlainAdamW plain(start, c.optimizer);
    std::vector<StepRecord> records;
    int split = 0, clipped = 0;
    for (int64_t step = 0; step < kSteps; ++step) {
      const StepRecord record = job->trainer->step(step);
      records.push_back(record);
      Vector g = gradient(*job, 0, scored(c, 0, step));
      const Vector a = gradient(*job, 1, scored(c, 1, step));
      std::map<std::string, double> ua, aa, c_align;
      for (size_t i = 0; i < g.size(); ++i) {
        ua[blocks[i]] += g[i] * a[i];
        aa[blocks[i]] += a[i] * a[i];
      }
      ASSERT_EQ(ua.size(), lora ? 2u : 4u);
      int64_t conflicts = 0;
      for (const auto& [block, product] : ua) {
        conflicts += product < 0;
        c_align[block] = 0.5 + (aa[block] > 1e-9 ? -std::min(product, 0.0) / aa[block] : 0.0);
        // The products are those of the same gradients; a quotient of two of them.
        EXPECT_NEAR(record.blocks.at(block).at("c_align") / c_align[block], 1.0, 1e-6);
      }
      for (size_t i = 0; i < g.size(); ++i) g[i] += c_align[blocks[i]] * a[i];
      const double norm = std::sqrt(dot(g, g));
      EXPECT_NEAR(record.grad_norm / norm, 1.0, 1e-6);
      plain.step(g);
      split += conflicts > 0 && conflicts < static_cast<int64_t>(ua.size());
      clipped += norm > 0.5;

      ASSERT_TRUE(record.block_coefficients);
      EXPECT_EQ(record.block_coefficients->conflicts, conflicts);
      double least = 1e300, most = -1e300, sum = 0;
      for (const auto& [block, value] : c_align) {
        least = std::min(least, value);
        most = std::max(most, value);
        sum += value / static_cast<double>(c_align.size());
      }
      EXPECT_NEAR(record.block_coefficients->align[0] / least, 1.0, 1e-6);
      EXPECT_NEAR(record.block_coefficients->align[1] / most, 1.0, 1e-6);
      EXPECT_NEAR(*record.c_align / sum, 1.0, 1e-6);
      EXPECT_EQ(record.block_coefficients->task, (std::array<double, 2>{1, 1}));
    }
    ASSERT_GT(split, 0) << "a step in which some blocks conflict and others do not";
    ASSERT_GT(clipped, 0);
    expect_weights(*job, plain, start);
    expect_the_same_on_every_layout(c, records);
  }
}

TEST_F(Objectives, LayerWiseSurgeryNeedsNoExchangeOfItsOwn) {
  RunConfig c = config(/*lora=*/true);
  c.objective.surgery = Surgery::block;
  TinyJob job(c, world());
  const int64_t before = job.mesh.world().traffic().at("scalars").calls;
  const auto records = job.run(0, 2);
  EXPECT_EQ(job.mesh.world().traffic().at("scalars").calls - before, 2);
  EXPECT_TRUE(records[1].block_coefficients);
  EXPECT_TRUE(records[1].blocks.empty()) << "recorded only with gram_per_block";
}

// Alignment in steps 0, 1 and 5, 6, the task in 2 to 4 and 7; 20 steps, so that the proximal term
// counts from step 3 on.
TEST_F(Objectives, LisaTakesTurnsAndPullsTowardsTheOtherPhasesEnd) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "lora" : "full");
    RunConfig c = config(lora);
    c.objective.rule = Rule::lisa;
    c.objective.lisa = LisaConfig{2, 3, 5.0};
    c.objective.align_loss = AlignLoss::sft;
    c.optimizer.eps = 1e-4;  // the drift is a difference of float32 weights: right to 3e-8 ρ
    const auto job = alone(c);
    const Vector start = masters(*job);
    PlainAdamW plain(start, c.optimizer);
    Vector anchor = start;
    std::vector<StepRecord> records;
    const bool aligns[kSteps] = {true, true, false, false, false, true, true, false};
    int64_t turns[2] = {0, 0};
    int pulled = 0;
    for (int64_t step = 0; step < kSteps; ++step) {
      const size_t active = aligns[step] ? 1 : 0;
      if (step > 0 && aligns[step] != aligns[step - 1]) anchor = plain.weights();
      const Vector before = plain.weights();
      const StepRecord record = job->trainer->step(step);
      records.push_back(record);
      Vector g = gradient(*job, active, scored(c, active, turns[active]++));
      Vector drift(g.size());
      for (size_t i = 0; i < g.size(); ++i) drift[i] = before[i] - anchor[i];
      const double rho = step > 2 ? 5.0 : 0.0;
      const double pull = rho * std::sqrt(dot(drift, drift) / dot(g, g));
      pulled += pull > 1e-2;
      // Rounding of float32 weights, whose differences are about lr, and 1 of norm to drift from.
      EXPECT_NEAR(*record.drift, std::sqrt(dot(drift, drift)), 1e-5);
      EXPECT_EQ(*record.c_drift, rho);
      EXPECT_EQ(std::isnan(record.loss_task), aligns[step]);
      EXPECT_EQ(record.loss_align.has_value(), aligns[step]);
      EXPECT_EQ(record.task_tokens == 0, aligns[step]);
      EXPECT_EQ(record.align_tokens == 0, !aligns[step]);
      EXPECT_EQ(std::pair(record.c_task, *record.c_align),
                aligns[step] ? std::pair(0.0, 1.0) : std::pair(1.0, 0.0));
      for (size_t i = 0; i < g.size(); ++i) g[i] += rho * drift[i];
      EXPECT_NEAR(record.grad_norm / std::sqrt(dot(g, g)), 1.0, 1e-5);
      plain.step(g);
    }
    ASSERT_GT(pulled, 1) << "the term must matter";
    expect_weights(*job, plain, start);
    expect_the_same_on_every_layout(c, records);
  }
}

TEST_F(Objectives, EpochsOfLisaRunEveryTaskSequenceAsOften) {
  RunConfig c = config(/*lora=*/true);
  c.objective.rule = Rule::lisa;
  c.objective.lisa = LisaConfig{2, 2, 0.0};
  c.train.steps.reset();
  c.train.epochs = 1;  // 11 sequences, 5 a step: three task steps, of which the last is smaller
  TinyJob job(c, world());
  ASSERT_EQ(job.trainer->total_steps(), 2 + 2 + 2 + 1);
  std::vector<int64_t> samples;
  for (int64_t step = 0; step < 7; ++step) {
    for (const int64_t sample : job.trainer->drawn_task_samples(step)) samples.push_back(sample);
  }
  std::sort(samples.begin(), samples.end());
  std::vector<int64_t> all(11);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  EXPECT_EQ(samples, all);
  EXPECT_DOUBLE_EQ(job.run(0, 7).back().epoch, 1.0);
}

// The first one is the same; from the second on the samples are those of the second renewal.
TEST_F(Objectives, RenewalsDrawTheAlignmentSetInItsOrder) {
  RunConfig c = config(/*lora=*/true);
  const auto every = alone(c);
  c.objective.align_every = 3;
  c.output += "-third";
  const auto third = alone(c);
  const StepRecord first = every->trainer->step(0);
  EXPECT_EQ(third->trainer->step(0).aa, first.aa);
  // With weights that do not move, each renewal's loss is that of the plain run's next step.
  RunConfig still = c;
  still.optimizer.lr = 1e-30;
  still.output += "-still";
  const auto now_and_then = alone(still);
  still.objective.align_every = 1;
  still.output += "-always";
  const auto always = alone(still);
  const auto a = now_and_then->run(0, 7), b = always->run(0, 3);
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(*a[i].loss_align, *b[i / 3].loss_align) << "step " << i;
  EXPECT_NE(*b[0].loss_align, *b[1].loss_align);
}

TEST_F(Objectives, StepsBetweenRenewalsDoNotPayForTheAlignmentSet) {
  RunConfig c = config(/*lora=*/false);
  c.objective.align_every = 2;
  if (all_->size() % 2 == 0) c.parallel.shards = all_->size() / 2;
  TinyJob job(c, world());
  auto calls = [&](dist::Communicator& group, const char* name) {
    const auto traffic = group.traffic();
    return traffic.contains(name) ? traffic.at(name).calls : 0;
  };
  auto sent = [&] {
    return std::pair{calls(job.mesh.shard_group(), "reduce_scatter"),
                     calls(job.mesh.replica_group(), "all_reduce")};
  };
  constexpr int64_t kUnits = 4;  // embedding, two blocks, head
  for (int64_t step = 0; step < 4; ++step) {
    const auto before = sent();
    job.trainer->step(step);
    const auto after = sent();
    const int64_t gradients = step % 2 == 0 || step == 1 ? 2 : 1;  // the KL's is zero in step 0
    if (job.mesh.shards() > 1) {
      EXPECT_EQ(after.first - before.first, gradients * kUnits);
    }
    if (job.mesh.replicas() > 1) {
      EXPECT_EQ(after.second - before.second, gradients * kUnits);
    }
  }
}

TEST_F(Objectives, ARenewalThatWasNotFiniteIsMadeUpForInTheNextStep) {
  RunConfig c = config(/*lora=*/false);
  c.objective.align_every = 4;
  c.objective.align_loss = AlignLoss::sft;
  c.optimizer.lr = 1e30;  // the first update sends the weights to where the others overflow
  c.optimizer.clip_norm = 0;
  TinyJob job(c, world());
  std::vector<bool> skipped, renewed;
  for (const StepRecord& record : job.run(0, 7)) {
    skipped.push_back(record.skipped);
    renewed.push_back(*record.align_renewed);
  }
  EXPECT_EQ(skipped, (std::vector<bool>{false, true, true, true, true, true, true}));
  EXPECT_EQ(renewed, (std::vector<bool>{true, false, false, false, true, true, true}));
}

}  // namespace
}  // namespace safegrad::testing
