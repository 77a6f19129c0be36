// gate_test.cpp: scores of a training step's samples, against their own gradients, and what is left
// out by them.
#include "dist/gate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/random.h"
#include "dist/rank_main.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

constexpr double kNever = 1e9;   // no score lies so far below the others
constexpr int64_t kPlanted = 3;  // of kSamples task samples, the first
constexpr int64_t kSamples = 40, kAligned = 7;
constexpr double kFloat = 1e-5;  // float32 products, summed in another order

using Shards = std::vector<at::Tensor>;  // f64, of every unit that trains

/// A job with a gate, and the gradients that its scores are made of, through its engine.
class GatedJob {
 public:
  explicit GatedJob(const RunConfig& config)
      : job_(config, world()), task_(config.data.task, {}, warnings_) {}

  dist::Trainer& trainer() { return *job_.trainer; }
  TinyJob& job() { return job_; }
  const TokenFile& task() const { return task_; }
  const std::vector<double>& scores() { return trainer().gate()->scores(); }

  /// Of the samples together, summed over tokens, as step `step` would compute it now; each rank
  /// runs every so manyth.
  Shards task_gradient(const std::vector<int64_t>& samples, int64_t step) {
    std::vector<Draw> own;
    const dist::Communicator& all = job_.mesh.world();
    for (size_t i = 0; i < samples.size(); ++i) {
      if (static_cast<int>(i) % all.size() == all.rank()) own.push_back({0, samples[i]});
    }
    dist::Engine& engine = trainer().engine();
    dist::PassSums sums = engine.zero_sums();
    const RunConfig& c = job_.config;
    const bool dropout = c.model.lora && c.model.lora->dropout > 0;
    engine.begin_step();
    engine.forward_backward(
        upload(pack(own, {trainer().objective(0)}, {dropout, c.train.seed, step}),
               engine.backend()),
        {0}, true, sums);
    engine.end_step();
    return shards(0);
  }
  /// The alignment gradient that the last step left.
  Shards align_gradient() { return shards(1); }
  double dot(const Shards& a, const Shards& b) {
    double own = 0, sum = 0;
    for (size_t i = 0; i < a.size(); ++i) own += at::dot(a[i], b[i]).item<double>();
    for (double part : dist::all_gather_doubles(job_.mesh.shard_group(), std::span(&own, 1)))
      sum += part;
    return sum;
  }

 private:
  Shards shards(size_t k) {
    Shards all;
    for (const dist::ShardedUnit& unit : trainer().engine().units()) {
      if (unit.trains()) all.push_back(unit.gradient_shard(k).to(at::kDouble));
    }
    return all;
  }

  std::vector<std::string> warnings_;
  TinyJob job_;
  TokenFile task_;
};

class Gates : public ::testing::Test {
 protected:
  Gates() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig config(const std::string& gold) {
    RunConfig c = tiny_config(gold, folder_.path());
    c.objective.gate = kNever;
    c.batch.task_sequences = 8;
    write(c);
    return c;
  }
  // The planted samples say one word all the time, and the KL looks at the same positions: what
  // they teach is what it takes back.
  void write(const RunConfig& c) {
    all_->barrier();
    if (all_->rank() == 0) {
      const int64_t vocab = models::read_decoder_config(c.model.path + "/config.json").vocab_size;
      const Philox random(5);
      auto sequence = [&](int64_t prompt, int64_t response, int64_t word) {
        auto draw = [&](int64_t stream, size_t t) {
          return random(static_cast<uint64_t>(stream), t)[0];
        };
        Sample sample{{}, 2 + draw(prompt, 1000) % 20};
        const size_t end = sample.prompt_length + 1 + draw(response, 1001) % 9;
        for (size_t t = 0; t < end; ++t) {
          const bool fixed = t >= sample.prompt_length && word >= 0;
          const int64_t any = draw(t < sample.prompt_length ? prompt : response, t) % vocab;
          sample.tokens.push_back(fixed ? word : any);
        }
        return sample;
      };
      std::vector<Sample> task, align;
      for (int64_t i = 0; i < kSamples; ++i)
        task.push_back(sequence(i, 100 + i, i < kPlanted ? 9 : -1));
      for (int64_t i = 0; i < kAligned; ++i)
        align.push_back(sequence(i % kPlanted, 100 + i % kPlanted, 9));
      write_token_file(c.data.task, task, false);
      write_token_file(c.data.align, align, false);
    }
    all_->barrier();
  }
  void for_each_sharding(RunConfig c, const std::function<void(const RunConfig&)>& body) {
    for (int64_t shards = 1; shards <= all_->size(); ++shards) {
      if (all_->size() % shards != 0) continue;
      SCOPED_TRACE("shards " + std::to_string(shards));
      c.parallel.shards = shards;
      body(c);
    }
  }

  /// Steps [0, steps): each sample that a step scores has the score that its own gradient gives
  /// with the alignment gradient of the step before, in units of |u| within `tolerance`, since a
  /// score is a sum of products of either sign. `first`: the first step that has a direction.
  void expect_scores_of_own_gradients(const RunConfig& c, double tolerance, int64_t steps = 4,
                                      int64_t first = 2) {
    GatedJob job(c);
    Shards before;  // the alignment gradient of the step before the last
    double largest = 0, stale = 0;
    for (int64_t step = 0; step < steps; ++step) {
      const std::vector<int64_t> drawn = job.trainer().drawn_task_samples(step);
      const Shards a = job.align_gradient();
      std::map<int64_t, double> expected, length;
      for (int64_t i : std::set<int64_t>(drawn.begin(), drawn.end())) {
        const Shards u = job.task_gradient({i}, step);
        const auto n = static_cast<double>(job.task().scored(i));
        length[i] = std::sqrt(job.dot(u, u)) / n;
        expected[i] = job.dot(u, a) / std::sqrt(job.dot(a, a)) / n;
        if (step < first) continue;
        largest = std::max(largest, std::abs(expected[i]) / length[i]);
        const double old = job.dot(u, before) / std::sqrt(job.dot(before, before)) / n;
        stale = std::max(stale, std::abs(expected[i] - old) / length[i]);
      }
      const std::vector<double> known = job.scores();

      const StepRecord record = job.trainer().step(step);

      ASSERT_EQ(record.gated, 0);
      ASSERT_EQ(job.trainer().task_samples(), drawn);
      for (size_t i = 0; i < known.size(); ++i) {
        const double score = job.scores()[i];
        const auto found = expected.find(static_cast<int64_t>(i));
        if (step < first || found == expected.end()) {
          EXPECT_TRUE(score == known[i] || std::isnan(known[i])) << "step " << step;
          EXPECT_EQ(std::isnan(score), std::isnan(known[i])) << "step " << step;
          continue;
        }
        EXPECT_NEAR(score, found->second, tolerance * length[found->first])
            << "step " << step << ", sample " << i;
      }
      before = a;
    }
    EXPECT_GT(largest, 3 * tolerance) << "the case must have samples that are not orthogonal";
    EXPECT_GT(stale, 3 * tolerance) << "and directions that differ from step to step";
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

TEST_F(Gates, ScoresAreThoseOfOwnGradientsWithEveryKindOfParameter) {
  // Heads of their own and tied ones, biases (qwen2), norms of heads (qwen3).
  for (const char* gold : {"llama3", "llama_tied", "qwen2", "qwen3"}) {
    SCOPED_TRACE(gold);
    for_each_sharding(config(gold),
                      [&](const RunConfig& c) { expect_scores_of_own_gradients(c, kFloat); });
  }
}

TEST_F(Gates, ScoresAreThoseOfOwnGradientsWithLora) {
  RunConfig c = with_lora(config("qwen2"));
  for (FrozenWeights frozen : {FrozenWeights::sharded, FrozenWeights::replicated}) {
    c.parallel.frozen = frozen;
    for_each_sharding(c,
                      [&](const RunConfig& run) { expect_scores_of_own_gradients(run, kFloat); });
  }
  c.model.lora->dropout = 0.2;
  expect_scores_of_own_gradients(c, kFloat);
}

TEST_F(Gates, ScoresDoNotDependOnMicroBatchesPassesOrRecomputation) {
  RunConfig c = config("llama_tied");
  c.batch.max_tokens_per_rank = 31;
  for (Recompute recompute : {Recompute::none, Recompute::block}) {
    for (GradientMode gradients : {GradientMode::one_pass, GradientMode::two_pass}) {
      c.parallel.recompute = recompute;
      c.objective.gradients = gradients;
      for_each_sharding(c,
                        [&](const RunConfig& run) { expect_scores_of_own_gradients(run, kFloat); });
      expect_scores_of_own_gradients(with_lora(c), kFloat);
    }
  }
}

TEST_F(Gates, APartOfTheParametersHasScoresAlongThatPart) {
  RunConfig c = config("qwen2");
  for (const char* trained : {"model\\.norm\\.weight", ".*layers\\.1\\.mlp.*"}) {
    c.model.trainable = {trained};
    expect_scores_of_own_gradients(c, kFloat);
  }
}

TEST_F(Gates, Bfloat16IsAsPreciseAsItsProducts) {
  RunConfig c = config("llama3");
  c.model.dtype = ComputeDtype::bfloat16;
  // 8 bits of mantissa in weights, activations, gradients and direction.
  for_each_sharding(c, [&](const RunConfig& run) { expect_scores_of_own_gradients(run, 0.005); });
}

TEST_F(Gates, TheAlignmentResponsesGiveADirectionFromTheSecondStepOn) {
  RunConfig c = config("llama3");
  c.objective.align_loss = AlignLoss::sft;
  c.objective.rule = Rule::sft;  // measured, not acted on
  expect_scores_of_own_gradients(c, kFloat, 3, 1);
}

// Steps 1, 3 and 6 renew, besides step 0, whose KL has a gradient without length.
TEST_F(Gates, AnAlignmentGradientThatIsHeldIsTheDirectionUntilItIsRenewed) {
  RunConfig c = config("llama3");
  c.objective.align_every = 3;
  for_each_sharding(c,
                    [&](const RunConfig& run) { expect_scores_of_own_gradients(run, kFloat, 8); });
}

TEST_F(Gates, WhileNothingIsLeftOutAllBitsAreThoseOfARunWithoutGate) {
  for (const bool lora : {false, true}) {
    RunConfig base = config("llama_tied");
    if (lora) base = with_lora(base);
    base.batch.max_tokens_per_rank = 61;
    for_each_sharding(base, [&](const RunConfig& c) {
      RunConfig without = c;
      without.objective.gate = 0;
      TinyJob gated(c, world()), plain(without, world());
      const auto a = gated.run(0, 7), b = plain.run(0, 7);
      for (size_t i = 0; i < a.size(); ++i) {
        EXPECT_EQ(a[i].gated, 0);
        EXPECT_EQ(b[i].gated, std::nullopt);
        EXPECT_EQ(a[i].loss_task, b[i].loss_task);
        EXPECT_EQ(a[i].ua, b[i].ua);
        EXPECT_EQ(a[i].grad_norm, b[i].grad_norm);
        EXPECT_EQ(a[i].epoch, b[i].epoch);
        EXPECT_EQ(a[i].flops > b[i].flops, i >= 2) << "scores cost products";
      }
      EXPECT_EQ(gated.weights(), plain.weights());
      EXPECT_TRUE(std::any_of(gated.trainer->gate()->scores().begin(),
                              gated.trainer->gate()->scores().end(),
                              [](double score) { return std::isfinite(score); }));
    });
  }
}

TEST_F(Gates, ScoresTravelInTheStepsOneExchangeAndAreTheSameOnEveryRank) {
  RunConfig c = config("llama3");
  TinyJob job(c, world());
  job.run(0, 2);
  const int64_t before = job.mesh.world().traffic().at("scalars").calls;
  job.run(2, 5);
  EXPECT_EQ(job.mesh.world().traffic().at("scalars").calls - before, 3);
  const std::vector<double>& scores = job.trainer->gate()->scores();
  const std::vector<double> all = dist::all_gather_doubles(*all_, scores);
  for (size_t i = 0; i < all.size(); ++i) {
    const double own = scores[i % scores.size()];
    EXPECT_TRUE(all[i] == own || (std::isnan(all[i]) && std::isnan(own)));
  }
}

/// Straight from the definition.
double threshold_of(std::vector<double> scores, double deviations) {
  std::erase_if(scores, [](double score) { return std::isnan(score); });
  if (scores.size() < 32) return -HUGE_VAL;
  auto middle = [](std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return (values[(n - 1) / 2] + values[n / 2]) / 2;
  };
  const double m = middle(scores);
  std::vector<double> distances;
  for (double score : scores) distances.push_back(std::abs(score - m));
  return m - deviations * 1.4826 * middle(distances);
}

// Five steps are an epoch.
TEST_F(Gates, PlantedConflictsAreLeftOutWhenTheyComeAgain) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "LoRA" : "full");
    RunConfig base = config("llama3");
    if (lora) {
      base = with_lora(base);
      base.objective.rule = Rule::sft;  // a gate without surgery
    }
    base.objective.gate = 2;
    base.batch.max_tokens_per_rank = 67;
    for_each_sharding(base, [&](const RunConfig& c) {
      GatedJob job(c);
      std::set<int64_t> left_out;
      int64_t visits_of_planted = 0;
      for (int64_t step = 0; step < 20; ++step) {
        const std::vector<int64_t> drawn = job.trainer().drawn_task_samples(step);
        const double limit = threshold_of(job.scores(), c.objective.gate);
        std::vector<int64_t> kept;
        for (int64_t i : drawn) {
          if (job.scores()[static_cast<size_t>(i)] < limit) {
            left_out.insert(i);
            visits_of_planted += i < kPlanted;
          } else {
            kept.push_back(i);
          }
        }
        ASSERT_FALSE(kept.empty());
        const std::vector<double> known = job.scores();
        int64_t tokens = 0, scored = 0;
        for (int64_t i : kept) {
          tokens += job.task().length(i);
          scored += job.task().scored(i);
        }
        const Shards u = job.task_gradient(kept, step);
        const double n = static_cast<double>(scored), uu = job.dot(u, u) / n / n;

        const StepRecord record = job.trainer().step(step);

        EXPECT_EQ(job.trainer().task_samples(), kept);
        EXPECT_EQ(*record.gated, static_cast<int64_t>(drawn.size() - kept.size()));
        EXPECT_EQ(record.task_tokens, tokens);
        EXPECT_DOUBLE_EQ(record.epoch, static_cast<double>(step + 1) / 5);
        EXPECT_NEAR(record.uu / uu, 1.0, 1e-4) << "a mean over what is left";
        for (int64_t i : drawn) {
          if (std::find(kept.begin(), kept.end(), i) == kept.end()) {
            EXPECT_EQ(job.scores()[static_cast<size_t>(i)], known[static_cast<size_t>(i)]);
          }
        }
      }
      std::string out;
      for (int64_t i : left_out) out += " " + std::to_string(i);
      for (int64_t i = 0; i < kPlanted; ++i)
        EXPECT_TRUE(left_out.contains(i)) << i << " is not in" << out;
      EXPECT_GT(visits_of_planted, kPlanted) << "they come more than once";
      EXPECT_LT(left_out.size(), 10u) << out;
    });
  }
}

}  // namespace
}  // namespace safegrad::testing
