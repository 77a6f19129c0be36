// layout_test.cpp: the same job on any number of ranks and any sharding is the same training.
#include <cmath>
#include <filesystem>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "dist/late_collectives.h"
#include "dist/rank_main.h"
#include "dist/separate_machines.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

constexpr int64_t kSteps = 20;

/// A shared folder with data, and the same job run by each rank alone as the reference.
class Layouts : public ::testing::Test {
 protected:
  Layouts() : all_(world()), folder_(*all_) {}

  void TearDown() override { all_->barrier(); }  // nobody removes the folder while another reads it

  RunConfig config(const std::string& gold = "qwen2") { return tiny_config(gold, folder_.path()); }
  void write(const RunConfig& config) {
    if (all_->rank() == 0) write_tiny_data(config);
    all_->barrier();
  }
  std::unique_ptr<TinyJob> alone(RunConfig config) {
    config.parallel.shards = 1;
    config.output += std::to_string(all_->rank());
    return std::make_unique<TinyJob>(config, all_->split(all_->rank()));
  }
  std::unique_ptr<TinyJob> together(const RunConfig& config) {
    return std::make_unique<TinyJob>(config, world());
  }
  std::vector<int64_t> shardings() const {
    std::vector<int64_t> result;
    for (int64_t s = 1; s <= all_->size(); ++s) {
      if (all_->size() % s == 0) result.push_back(s);
    }
    return result;
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

// float32 gradients summed in another order; AdamW's division by sqrt(v) makes the smallest of them
// count. 1e-5 is the promise.
void expect_same_curve(const std::vector<StepRecord>& a, const std::vector<StepRecord>& b,
                       double tolerance = 1e-5) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i].loss_task / b[i].loss_task, 1.0, tolerance) << "step " << i;
    if (b[i].loss_align && *b[i].loss_align > 1e-6) {
      EXPECT_NEAR(*a[i].loss_align / *b[i].loss_align, 1.0, 100 * tolerance)
          << "step " << i;  // a KL near 0 is a difference
    }
  }
}

void expect_same_bits(const std::vector<StepRecord>& a, const std::vector<StepRecord>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].loss_task, b[i].loss_task) << "step " << i;
    EXPECT_EQ(a[i].loss_align, b[i].loss_align) << "step " << i;
    EXPECT_EQ(a[i].uu, b[i].uu) << "step " << i;
    EXPECT_EQ(a[i].ua, b[i].ua) << "step " << i;
    EXPECT_EQ(a[i].c_align, b[i].c_align) << "step " << i;
  }
}

int64_t conflicts(const std::vector<StepRecord>& records) {
  int64_t n = 0;
  for (const StepRecord& r : records) n += r.conflict;
  return n;
}

TEST_F(Layouts, AnyShardingGivesTheSameLossCurve) {
  for (const char* gold : {"qwen2", "llama3"}) {
    const RunConfig base = config(gold);
    write(base);
    const auto reference = alone(base)->run(0, kSteps);
    ASSERT_GT(conflicts(reference), 3) << "the case must contain conflicts";
    ASSERT_LT(reference.back().loss_task, 0.9 * reference.front().loss_task)
        << "the case must learn";
    for (int64_t shards : shardings()) {
      SCOPED_TRACE(std::string(gold) + " shards " + std::to_string(shards));
      RunConfig c = base;
      c.parallel.shards = shards;
      expect_same_curve(together(c)->run(0, kSteps), reference);
    }
  }
}

TEST_F(Layouts, RanksOnSeparateMachinesGiveTheSameBits) {
  RunConfig c = config();
  c.output += "-near";
  write(c);
  const auto near = together(c);
  const auto expected = near->run(0, kSteps);
  c.output += "-far";
  TinyJob far(c, std::make_unique<SeparateMachines>(world()));

  expect_same_bits(far.run(0, kSteps), expected);
  EXPECT_EQ(far.weights(), near->weights());
}

TEST_F(Layouts, OnlyWhatThePatternsNameIsTrained) {
  RunConfig base = config("qwen2");
  base.model.trainable = {".*\\.q_proj\\..*", "model\\.norm\\.weight", ".*layers\\.0\\.mlp.*"};
  base.optimizer.lr = 5e-3;
  write(base);
  const auto one = alone(base);
  const auto before = one->tensors();
  const auto reference = one->run(0, kSteps);
  const auto after = one->tensors();
  ASSERT_LT(reference.back().loss_task, reference.front().loss_task);
  size_t trained = 0;
  for (const auto& [name, values] : after) {
    const bool named = name.find(".q_proj.") != std::string::npos || name == "model.norm.weight" ||
                       name.find("layers.0.mlp") != std::string::npos;
    EXPECT_EQ(values != before.at(name), named) << name;
    trained += named;
  }
  EXPECT_EQ(trained, 2 * 2 + 1 + 3) << "q weights and biases, the norm, a layer's three matrices";
  for (int64_t shards : shardings()) {
    SCOPED_TRACE("shards " + std::to_string(shards));
    RunConfig c = base;
    c.parallel.shards = shards;
    expect_same_curve(together(c)->run(0, kSteps), reference);
  }
}

TEST_F(Layouts, LoraWithDropoutDoesNotDependOnTheLayout) {
  RunConfig base = config();
  base.model.trainable.clear();
  base.model.lora = LoraConfig{
      .rank = 4, .alpha = 8, .dropout = 0.2, .targets = {"q_proj", "v_proj", "down_proj"}};
  base.optimizer.lr = 1e-2;
  write(base);
  const auto reference = alone(base)->run(0, kSteps);
  ASSERT_LT(reference.back().loss_task, reference.front().loss_task);
  for (int64_t shards : shardings()) {
    for (FrozenWeights frozen : {FrozenWeights::sharded, FrozenWeights::replicated}) {
      SCOPED_TRACE("shards " + std::to_string(shards));
      RunConfig c = base;
      c.parallel.shards = shards;
      c.parallel.frozen = frozen;
      expect_same_curve(together(c)->run(0, kSteps), reference);
    }
  }
}

TEST_F(Layouts, AccumulationRecomputationAndTwoPassesChangeNothing) {
  const RunConfig base = config();
  write(base);
  const auto reference = alone(base)->run(0, kSteps);
  std::vector<RunConfig> variants(4, base);
  variants[0].batch.max_tokens_per_rank = 41;  // one sequence or two a micro-batch
  variants[1].parallel.recompute = Recompute::block;
  variants[2].objective.gradients = GradientMode::two_pass;
  variants[3].objective.gradients = GradientMode::two_pass;
  variants[3].batch.max_tokens_per_rank = 41;
  variants[3].parallel.shards = 1;
  for (size_t i = 0; i < variants.size(); ++i) {
    SCOPED_TRACE("variant " + std::to_string(i));
    expect_same_curve(together(variants[i])->run(0, kSteps), reference);
  }
}

TEST_F(Layouts, TheSameRunTwiceGivesTheSameBits) {
  for (int64_t shards : shardings()) {
    RunConfig c = config("llama3");
    c.parallel.shards = shards;
    write(c);
    const auto first = together(c), second = together(c);
    expect_same_bits(first->run(0, kSteps), second->run(0, kSteps));
    EXPECT_EQ(first->weights(), second->weights()) << "shards " << shards;
  }
}

TEST_F(Layouts, NothingIsReadOrChangedBeforeItsCollectiveIsOver) {
  for (int64_t shards : shardings()) {
    for (Recompute recompute : {Recompute::none, Recompute::block}) {
      for (bool lora : {false, true}) {
        RunConfig c = config("llama3");
        c.parallel.shards = shards;
        c.parallel.recompute = recompute;
        c.batch.max_tokens_per_rank = 64;  // several micro-batches
        if (lora) c.model.lora = LoraConfig{.dropout = 0.1};
        write(c);
        TinyJob late(c, std::make_unique<LateCollectives>(world()));
        expect_same_bits(late.run(0, 4), together(c)->run(0, 4));
      }
    }
  }
}

/// Counts the buffers that collectives read and write.
class CountsBuffers : public SeparateMachines {
 public:
  CountsBuffers(std::unique_ptr<dist::Communicator> inner, std::shared_ptr<int64_t> count)
      : SeparateMachines(std::move(inner)), count_(std::move(count)) {}

  at::Tensor allocate_gather_output(int64_t numel, at::ScalarType dtype) override {
    ++*count_;
    return SeparateMachines::allocate_gather_output(numel, dtype);
  }
  at::Tensor allocate_reduce_input(int64_t numel, at::ScalarType dtype) override {
    ++*count_;
    return SeparateMachines::allocate_reduce_input(numel, dtype);
  }
  std::unique_ptr<dist::Communicator> split(int colour) override {
    return std::make_unique<CountsBuffers>(inner_->split(colour), count_);
  }

 private:
  std::shared_ptr<int64_t> count_;
};

TEST_F(Layouts, BuffersAreAllocatedInTheFirstStepAndThenLent) {
  if (all_->size() == 1) GTEST_SKIP() << "one rank needs none";
  RunConfig c = config("llama3");
  c.batch.max_tokens_per_rank = 64;
  write(c);
  const auto count = std::make_shared<int64_t>(0);
  TinyJob job(c, std::make_unique<CountsBuffers>(world(), count));
  job.run(0, 1);
  const int64_t after_one = *count;
  job.run(1, 6);

  EXPECT_EQ(*count, after_one);
  // Blocks: at most two gathered (one in use, one on its way), and two with both gradients (one in
  // its backward, one in its reductions). Embedding, head and reference head are each of a size of
  // their own here: at most two buffers of a size more.
  EXPECT_GE(after_one, 2 + 4);
  EXPECT_LE(after_one, 2 + 4 + 3 * (1 + 2));
}

TEST_F(Layouts, LateCollectivesAreLate) {
  if (all_->size() == 1) GTEST_SKIP() << "one rank gathers nothing";
  LateCollectives late(world());
  const auto there = at::TensorOptions().dtype(at::kFloat).device(backend().device());
  const at::Tensor shard = at::ones({4}, there);
  at::Tensor full = at::zeros({4 * late.size()}, there);
  const auto work = late.all_gather(full, shard);
  EXPECT_TRUE(full.isnan().all().item<bool>()) << "a read that does not wait would see the result";
  shard.fill_(2);  // a change that does not wait
  work->wait();
  EXPECT_TRUE(full.eq(2).all().item<bool>());
}

TEST_F(Layouts, AllRanksHoldTheSameBits) {
  const RunConfig c = config();
  write(c);
  const auto job = together(c);
  for (const StepRecord& record : job->run(0, 5)) {
    const double own[] = {record.loss_task, *record.loss_align, record.uu,  *record.ua,
                          *record.aa,       *record.c_align,    record.clip};
    const auto all = dist::all_gather_doubles(*all_, own);
    for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], own[i % std::size(own)]);
  }
}

TEST_F(Layouts, CountersShowTwoGathersTwoReductionsAndOneScalarReduction) {
  const RunConfig c = config("llama3");  // untied: embedding, 2 blocks, head (and the reference's
                                         // head, which only gathers)
  write(c);
  const auto job = together(c);
  if (job->mesh.shards() == 1) GTEST_SKIP() << "one rank gathers nothing";
  job->run(0, 1);
  const auto before = job->mesh.shard_group().traffic();
  const auto world_before = job->mesh.world().traffic();
  job->run(1, 4);
  const auto& after = job->mesh.shard_group().traffic();

  constexpr int64_t kRunSteps = 3, kBlocks = 2;
  // Gathers: each block twice; embedding, head and reference head once each (lookup; loss and its
  // gradient in one place).
  EXPECT_EQ(after.at("all_gather").calls - before.at("all_gather").calls,
            kRunSteps * (2 * kBlocks + 3));
  // Reductions: both gradients of every trainable unit.
  EXPECT_EQ(after.at("reduce_scatter").calls - before.at("reduce_scatter").calls,
            kRunSteps * 2 * (kBlocks + 2));
  EXPECT_EQ(job->mesh.world().traffic().at("scalars").calls - world_before.at("scalars").calls,
            kRunSteps);
  EXPECT_FALSE(after.contains("all_reduce"));
}

TEST_F(Layouts, HybridAddsOneAllReducePerGradientAndUnit) {
  if (all_->size() != 4) GTEST_SKIP() << "needs 4 ranks";
  RunConfig c = config("llama3");
  c.parallel.shards = 2;
  write(c);
  const auto job = together(c);
  job->run(0, 2);

  EXPECT_EQ(job->mesh.replica_group().traffic().at("all_reduce").calls, 2 * 2 * 4);
}

TEST_F(Layouts, ANonFiniteStepIsSkippedByAllRanksTogether) {
  RunConfig c = config();
  c.optimizer.lr = 1e30;  // the first update sends the weights to where the second step overflows
  c.optimizer.clip_norm = 0;
  write(c);
  const auto job = together(c);
  const auto first = job->run(0, 1);
  ASSERT_FALSE(first[0].skipped);
  const auto weights = job->weights();
  const auto next = job->run(1, 3);

  EXPECT_TRUE(next[0].skipped);
  EXPECT_TRUE(next[1].skipped);
  EXPECT_EQ(job->weights(), weights) << "a skipped step moves nothing";
}

using BlockGrams = std::map<std::string, std::map<std::string, double>>;

// The prefix of a parameter's Hugging Face name says which block it is in.
std::string block_of(const std::string& parameter) {
  const std::string layers = "model.layers.";
  if (parameter.starts_with(layers)) {
    return "block " +
           parameter.substr(layers.size(), parameter.find('.', layers.size()) - layers.size());
  }
  return parameter == "model.embed_tokens.weight" ? "embedding" : "head";
}

/// Inner products by block of the mean gradients that a job's last step left, on one shard: plain
/// loops over the flat gradients.
BlockGrams grams_by_hand(TinyJob& job, const StepRecord& record, double task_tokens,
                         double align_tokens) {
  BlockGrams grams;
  for (const dist::ShardedUnit& unit : job.trainer->engine().units()) {
    if (!unit.trains()) continue;
    const at::Tensor u = unit.gradient_shard(0).cpu(), a = unit.gradient_shard(1).cpu();
    int64_t next = 0;
    for (const Parameter* p : unit.unit().parameters) {
      if (!p->trainable) continue;
      auto& gram = grams[block_of(p->name)];
      for (int64_t end = next + p->numel(); next < end; ++next) {
        const double ui = u.const_data_ptr<float>()[next] / task_tokens;
        const double ai = a.const_data_ptr<float>()[next] / align_tokens;
        gram["uu"] += ui * ui;
        gram["ua"] += ui * ai;
        gram["aa"] += ai * ai;
      }
    }
  }
  EXPECT_GT(record.uu, 0);
  return grams;
}

// Response tokens of a step's samples of objective k.
double scored(const RunConfig& c, const std::string& path, size_t k, int64_t step) {
  std::vector<std::string> warnings;
  const TokenFile file(path, {}, warnings);
  const int64_t per_step = k == 0 ? c.batch.task_sequences : c.batch.align_sequences;
  double tokens = 0;
  for (int64_t p = step * per_step; p < (step + 1) * per_step; ++p) {
    const auto order = epoch_order(file.size(), c.train.seed, k, p / file.size());
    tokens += static_cast<double>(file.scored(order[static_cast<size_t>(p % file.size())]));
  }
  return tokens;
}

TEST_F(Layouts, EveryBlockHasItsGramMatrixWithAndWithoutLora) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "lora" : "full");
    RunConfig base = config("llama3");
    base.objective.gram_per_block = true;
    if (lora) {
      base.model.trainable.clear();
      base.model.lora = LoraConfig{.rank = 4, .alpha = 8, .targets = {"q_proj", "down_proj"}};
      base.optimizer.lr = 1e-2;
    }
    write(base);
    const auto one = alone(base);
    const StepRecord reference = one->run(0, 3).back();
    const BlockGrams expected = grams_by_hand(*one, reference, scored(base, base.data.task, 0, 2),
                                              scored(base, base.data.align, 1, 2));
    ASSERT_EQ(expected.size(), lora ? 2u : 4u);
    for (int64_t shards : shardings()) {
      SCOPED_TRACE("shards " + std::to_string(shards));
      RunConfig c = base;
      c.parallel.shards = shards;
      const auto job = together(c);
      const StepRecord record = job->run(0, 3).back();
      ASSERT_EQ(record.blocks.size(), 4u) << "embedding, two blocks, head; frozen ones are zero";
      double ua = 0;
      for (const auto& [name, values] : record.blocks) {
        ua += values.at("ua");
        for (const auto& [product, value] : values) {
          const double by_hand = expected.contains(name) ? expected.at(name).at(product) : 0.0;
          // Three steps of float32 gradients summed in another order; ua may cancel.
          const double size =
              expected.contains(name)
                  ? std::sqrt(expected.at(name).at("uu") * expected.at(name).at("aa"))
                  : 0.0;
          EXPECT_NEAR(value, by_hand, 1e-4 * (product == "ua" ? size : by_hand)) << name << product;
        }
      }
      EXPECT_NEAR(ua / *record.ua, 1.0, 1e-9);
    }
  }
}

TEST_F(Layouts, TheShardsOfAdaptersEndInsideOfBlocks) {
  if (all_->size() != 3) GTEST_SKIP() << "two halves of two alike blocks end between them";
  RunConfig c = config("llama3");
  c.model.trainable.clear();
  c.model.lora = LoraConfig{.rank = 4, .targets = {"q_proj", "down_proj"}};
  write(c);
  const auto job = together(c);
  const dist::ShardedUnit& adapters = job->trainer->engine().units().back();
  const auto state = adapters.state();
  if (all_->rank() + 1 == all_->size()) return;  // the last one ends with the unit
  EXPECT_NE(state.end % (state.numel / 2), 0) << "else every block lies in one shard";
}

TEST_F(Layouts, ProbesDoNotDependOnTheLayout) {
  RunConfig base = config();
  base.probe = {{"choices", folder_.path() + "/choices.safetensors", 1},
                {"held-out", folder_.path() + "/heldout.safetensors", 1}};
  write(base);
  const auto reference = alone(base);
  reference->run(0, 3);
  const auto expected = reference->trainer->run_probes(3);
  ASSERT_GT(expected.at("held-out").at("kl"), 1e-5);
  for (int64_t shards : shardings()) {
    RunConfig c = base;
    c.parallel.shards = shards;
    const auto job = together(c);
    job->run(0, 3);
    const auto found = job->trainer->run_probes(3);
    EXPECT_EQ(found.at("choices"), expected.at("choices")) << "shares are counts";
    EXPECT_NEAR(found.at("held-out").at("loss") / expected.at("held-out").at("loss"), 1.0, 1e-5);
    EXPECT_NEAR(found.at("held-out").at("kl") / expected.at("held-out").at("kl"), 1.0, 1e-3);
  }
}

// The likeliest next token, by a forward pass over the whole text.
int64_t next_token(dist::Engine& engine, const std::vector<int64_t>& text) {
  return logits_of(engine, text)[-1].argmax().item<int64_t>();
}

TEST_F(Layouts, GreedySharesAreWhatDecodingWouldSay) {
  RunConfig c = config();
  write(c);
  const auto job = together(c);
  dist::Engine& engine = job->trainer->engine();
  const int64_t vocab = job->model.decoder->vocab_size();
  std::vector<Sample> samples;
  constexpr int32_t kGroups = 8;
  for (int32_t g = 0; g < kGroups; ++g) {
    std::vector<int64_t> text = {g + 1, 2 * g + 3, 7};
    const int64_t first = next_token(engine, text);
    text.push_back(first);
    const int64_t second = next_token(engine, text);
    // Left: two tokens, the greedy ones in every second group, else a wrong one behind or ahead.
    text.push_back(g % 2 == 0 ? second : (second + 1) % vocab);
    if (g % 4 == 3) text[3] = (first + 1) % vocab;
    samples.push_back({text, 3, g, 0});
    // Right: one token, the greedy one in group 5 alone.
    text.resize(3);
    text.push_back(g == 5 ? first : (first + 2) % vocab);
    samples.push_back({text, 3, g, 1});
  }
  c.probe = {{"greedy", folder_.path() + "/greedy.safetensors", 1}};
  if (all_->rank() == 0) write_token_file(c.probe[0].file, samples, true);
  all_->barrier();

  const auto shares = together(c)->trainer->run_probes(1).at("greedy");

  EXPECT_EQ(shares.at("greedy_left"), 4.0 / kGroups);
  EXPECT_EQ(shares.at("greedy_right"), 1.0 / kGroups);
  EXPECT_EQ(shares.at("left") + shares.at("right"), 1.0);
}

TEST_F(Layouts, Bfloat16FollowsFloat32) {
  RunConfig base = config();
  write(base);
  const auto reference = alone(base)->run(0, kSteps);
  for (int64_t shards : shardings()) {
    RunConfig c = base;
    c.parallel.shards = shards;
    c.model.dtype = ComputeDtype::bfloat16;
    const auto records = together(c)->run(0, kSteps);
    // 8 bits of mantissa: a per mille or so a loss, compounded over the steps.
    expect_same_curve(records, reference, 0.05);
  }
}

TEST_F(Layouts, TheReferenceCacheIsUsedAgainAtAnotherRankCount) {
  const RunConfig c = config();
  write(c);
  const auto first = together(c)->run(0, 3);
  all_->barrier();
  const TinyJob later(c, all_->split(all_->rank()));
  for (const auto& entry : std::filesystem::directory_iterator(c.output + "/reference")) {
    EXPECT_TRUE(
        entry.path().string().ends_with("-of-" + std::to_string(all_->size()) + ".safetensors"))
        << entry.path() << " was computed although a complete cache was there";
  }
}

}  // namespace
}  // namespace safegrad::testing
