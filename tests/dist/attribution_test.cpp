// attribution_test.cpp: a step that is not finite is skipped by all ranks, and its record names
// what broke and nothing else.
#include "dist/attribution.h"

#include <algorithm>
#include <functional>
#include <limits>

#include <gtest/gtest.h>

#include "dist/rank_main.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

/// The values of another source, changed by name: change(name, element, value) -> value.
class ChangedWeights : public WeightSource {
 public:
  using Change = std::function<float(const std::string&, int64_t, float)>;
  ChangedWeights(const WeightSource& inner, Change change)
      : inner_(inner), change_(std::move(change)) {}
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override {
    inner_.read(name, begin, end, out);
    for (int64_t i = begin; i < end; ++i) out[i - begin] = change_(name, i, out[i - begin]);
  }

 private:
  const WeightSource& inner_;
  Change change_;
};

/// TinyJob with changed weights, which are the reference's too.
struct ChangedJob {
  ChangedJob(const RunConfig& config, const ChangedWeights::Change& change)
      : model(models::open_model(config.model, config.train.seed, backend())),
        mesh(world(), config.parallel.shards) {
    std::vector<std::string> warnings;
    const auto data = dist::open_data(config, *model.decoder, "", warnings);
    trainer = std::make_unique<dist::Trainer>(config, *model.decoder,
                                              ChangedWeights(*model.weights, change), data, mesh);
  }
  /// The step's record, and how often it gathered scalars.
  std::pair<StepRecord, int64_t> step(int64_t index) {
    const int64_t before = mesh.world().traffic().at("scalars").calls;
    StepRecord record = trainer->step(index);
    return {record, mesh.world().traffic().at("scalars").calls - before};
  }
  std::vector<std::string> unit_names() const {
    std::vector<std::string> names;
    for (const Unit& unit : model.decoder->units()) names.push_back(unit.name);
    return names;
  }

  models::OpenedModel model;
  dist::Mesh mesh;
  std::unique_ptr<dist::Trainer> trainer;
};

using Units = std::vector<std::pair<std::string, std::vector<std::string>>>;

constexpr int64_t kWidth = 24, kVocabulary = 101, kBad = 100;  // of llama3; its head is not tied

class Attribution : public ::testing::Test {
 protected:
  Attribution() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig config() const { return tiny_config("llama3", folder_.path()); }
  void write(const RunConfig& c) {
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
  }
  // Every step of every sharding in turn.
  void for_each_sharding(const std::function<void(const RunConfig&)>& body, RunConfig c) {
    for (int64_t shards = 1; shards <= all_->size(); ++shards) {
      if (all_->size() % shards != 0) continue;
      SCOPED_TRACE("shards " + std::to_string(shards));
      c.parallel.shards = shards;
      body(c);
    }
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

// The layer computes what it does with its matrices scaled by powers whose product is 1, so values
// and gradients outside stay as they are; but its activations of 1e36 times an output gradient of
// thousands (from a large head) leave float32, in the gradient of one matrix alone. At the first
// step the KL's gradient is zero, and so is its product with anything finite.
float overflow_in(int64_t layer, const std::string& name, float value) {
  const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
  if (name == mlp + "gate_proj.weight" || name == mlp + "up_proj.weight") return value * 1e18f;
  if (name == mlp + "down_proj.weight") return value * 1e-36f;
  if (name == "lm_head.weight") return value * 1e5f;
  return value;
}

TEST_F(Attribution, AnOverflowInOneWeightGradientNamesItsUnitAndObjectiveAlone) {
  write(config());
  for (const int64_t layer : {0, 1}) {
    SCOPED_TRACE("layer " + std::to_string(layer));
    for_each_sharding(
        [&](const RunConfig& c) {
          ChangedJob job(c, [&](const std::string& name, int64_t, float value) {
            return overflow_in(layer, name, value);
          });
          const std::string unit =
              job.model.decoder->units()[job.model.decoder->block_unit(layer)].name;
          const auto [record, gathers] = job.step(0);
          ASSERT_TRUE(record.skipped);
          ASSERT_TRUE(record.not_finite);
          EXPECT_TRUE(std::isfinite(record.loss_task));
          EXPECT_TRUE(record.not_finite->losses.empty());
          EXPECT_EQ(record.not_finite->blocks, (Units{{unit, {"task"}}}));
          EXPECT_EQ(record.not_finite->samples, (std::map<std::string, std::vector<int64_t>>{
                                                    {"task", job.trainer->drawn_task_samples(0)}}));
          EXPECT_EQ(gathers, 2) << "the step's own, and one to find out";
          EXPECT_EQ(job.trainer->updates(), 0);
        },
        config());
  }
}

// The adapter's B is zero at first: it changes no value, and its gradient is dyᵀ (x Aᵀ) with the x
// of before.
TEST_F(Attribution, AnOverflowInAnAdapterNamesItsBlock) {
  RunConfig lora = config();
  lora.model.trainable.clear();
  lora.model.lora = LoraConfig{.rank = 4, .targets = {"q_proj", "down_proj"}};
  write(lora);
  for (const int64_t layer : {0, 1}) {
    SCOPED_TRACE("layer " + std::to_string(layer));
    for_each_sharding(
        [&](const RunConfig& c) {
          ChangedJob job(c, [&](const std::string& name, int64_t, float value) {
            return overflow_in(layer, name, value);
          });
          const auto [record, gathers] = job.step(0);
          ASSERT_TRUE(record.skipped);
          ASSERT_TRUE(record.not_finite);
          EXPECT_TRUE(record.not_finite->losses.empty());
          EXPECT_EQ(record.not_finite->blocks,
                    (Units{{"block " + std::to_string(layer), {"task"}}}));
          EXPECT_EQ(gathers, 2) << "the step's own, and one to find out";
        },
        lora);
  }
}

TEST_F(Attribution, WithoutTheOverflowTheSameStepIsFinite) {
  write(config());
  for_each_sharding(
      [&](const RunConfig& c) {
        ChangedJob job(c, [](const std::string& name, int64_t, float value) {
          return name == "lm_head.weight" ? value * 1e5f : value;
        });
        const auto [record, gathers] = job.step(0);
        EXPECT_FALSE(record.skipped);
        EXPECT_FALSE(record.not_finite);
        EXPECT_EQ(gathers, 1);
      },
      config());
}

TEST_F(Attribution, ABadEmbeddingNamesTheRankAndTheSamplesThatReadIt) {
  RunConfig c = config();
  c.batch.task_sequences = 11;
  if (all_->rank() == 0) {
    std::vector<Sample> task, align;
    for (int64_t i = 0; i < 11; ++i) {
      Sample sample{{}, 4};
      for (int64_t t = 0; t < 8 + i % 3; ++t) sample.tokens.push_back((7 * i + t) % kBad);
      if (i == 6)
        sample.tokens[2] = kBad;  // in the prompt: no loss asks for it, attention reads it
      task.push_back(sample);
      align.push_back({{i, i + 1, i + 2, i + 3}, 2});
    }
    write_token_file(c.data.task, task, false);
    write_token_file(c.data.align, align, false);
  }
  all_->barrier();
  for_each_sharding(
      [&](const RunConfig& sharded) {
        ChangedJob job(sharded, [](const std::string& name, int64_t i, float value) {
          const bool bad = name == "model.embed_tokens.weight" && i == kBad * kWidth + 5;
          return bad ? std::numeric_limits<float>::infinity() : value;
        });
        const auto before = job.trainer->engine().fingerprint();
        const auto [record, gathers] = job.step(0);
        ASSERT_TRUE(record.skipped);
        ASSERT_TRUE(record.not_finite);
        const NotFinite& what = *record.not_finite;

        EXPECT_FALSE(what.losses.contains("align"));
        ASSERT_TRUE(what.losses.contains("task"));
        EXPECT_EQ(what.losses.at("task").size(), 1u) << "one rank has the sample";
        const std::vector<int64_t>& samples = what.samples.at("task");
        EXPECT_TRUE(std::find(samples.begin(), samples.end(), 6) != samples.end());
        EXPECT_EQ(samples.size() == 11, all_->size() == 1) << "other ranks' samples are not it";
        EXPECT_FALSE(what.samples.contains("align"));
        // What is behind the forward pass is broken everywhere, for this objective alone.
        Units expected;
        for (const std::string& name : job.unit_names()) expected.push_back({name, {"task"}});
        EXPECT_EQ(what.blocks, expected);
        EXPECT_EQ(job.trainer->engine().fingerprint(), before) << "a skipped step changes nothing";
      },
      c);
}

}  // namespace
}  // namespace safegrad::testing
