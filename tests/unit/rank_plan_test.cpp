// rank_plan_test.cpp: what a plan says about a rank is what that rank holds and sends when it is
// run, and what a hand calculation says.
#include "dist/rank_plan.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/error.h"
#include "core/machine_memory.h"
#include "core/random_tokens.h"
#include "cpu/cpu_backend.h"
#include "dist/held_gradient.h"
#include "dist/run_shape.h"
#include "models/open_model.h"
#include "plan.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using dist::RankPlan;

/// A three-block decoder; 64 wide, sizes that shards do not divide.
std::string shape(const std::string& architecture, int64_t kv_heads, bool tied) {
  return fmt::format(
      R"({{"architectures": ["{}ForCausalLM"], "hidden_size": 64, "intermediate_size": 176,
      "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": {}, "head_dim": 16,
      "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
      "hidden_act": "silu", "vocab_size": 1003, "tie_word_embeddings": {}}})",
      architecture, kv_heads, tied);
}

/// A config with data in a folder; plans of it, and runs of their fullest ranks.
class Plan : public ::testing::Test {
 protected:
  Plan() {
    test::write_text(folder_ / "tied.json", shape("Llama", 2, true));
    test::write_text(folder_ / "untied.json", shape("Llama", 2, false));
    test::write_text(folder_ / "qwen3.json", shape("Qwen3", 2, false));
    test::write_text(folder_ / "ungrouped.json", shape("Llama", 4, false));
    config_.model.config = folder_ / "tied.json";
    config_.data.task = folder_ / "task.safetensors";
    config_.data.align = folder_ / "align.safetensors";
    config_.batch.task_sequences = 8;
    config_.batch.align_sequences = 5;
    config_.train.steps = 4;
    config_.output = folder_ / "out";
  }

  void write_data(int64_t length) {
    write_random_tokens(config_.data.task, {40, length, length / 2, 1000, 1});
    write_random_tokens(config_.data.align, {20, length - 3, length / 3, 1000, 2});
  }
  void train_adapters() {
    config_.model.trainable.clear();
    config_.model.lora = LoraConfig{.rank = 4, .dropout = 0.1, .targets = {"q_proj", "down_proj"}};
  }

  models::OpenedModel open() {
    return models::open_model_shape(config_.model, config_.train.seed, cpu_backend());
  }
  dist::PlanInput input(const models::OpenedModel& model) {
    std::vector<std::string> warnings;
    data_ = dist::open_data(config_, *model.decoder, "", warnings);
    dist::PlanInput in = plan_input(config_, data_, /*gpu=*/false, /*near=*/1);
    in.hardware = known_hardware();
    in.device = in.hardware.device("h100");
    in.separate_machines = true;
    return in;
  }
  RankPlan plan(int64_t ranks) {
    const auto model = open();
    return dist::plan_rank(*model.decoder, input(model), ranks);
  }

  // float32: every tensor is counted, and the measured peak is off by what a step holds besides
  // (scalars of the exchange). bfloat16 on a CPU: oneDNN's scratch memory is not in the plan, a
  // tenth of the logits of a chunk; 5 % is the promise.
  void expect_run_as_planned(int64_t ranks) {
    SCOPED_TRACE(fmt::format("{} ranks, {} shards", ranks, config_.parallel.shards));
    const double tolerance = config_.model.dtype == ComputeDtype::float32 ? 0.002 : 0.05;
    auto model = open();
    const RankPlan plan = dist::plan_rank(*model.decoder, input(model), ranks);
    const RankRun run = run_rank(config_, model, data_, plan);

    EXPECT_NEAR(static_cast<double>(plan.memory.peak()) / static_cast<double>(run.tensor_bytes),
                1.0, tolerance)
        << plan.memory.moment << ", planned " << plan.memory.peak() << ", held "
        << run.tensor_bytes;
    EXPECT_EQ(plan.traffic.size(), run.traffic.size());
    for (const auto& [name, sent] : run.traffic) {
      ASSERT_TRUE(plan.traffic.contains(name)) << name;
      EXPECT_EQ(plan.traffic.at(name).calls, sent.calls) << name;
      EXPECT_EQ(plan.traffic.at(name).bytes, sent.bytes) << name;
    }
    peaks_.push_back(plan.memory.peak());
  }

  /// Data parallel, hybrid and fully sharded.
  void expect_every_layout_as_planned() {
    for (int64_t ranks : {8, 64, 1024}) {
      for (int64_t shards : {int64_t{1}, int64_t{4}, ranks}) {
        config_.parallel.shards = shards;
        expect_run_as_planned(ranks);
      }
      EXPECT_NE(peaks_[peaks_.size() - 1], peaks_[peaks_.size() - 3]) << "sharding must matter";
    }
  }

  test::TempFolder folder_;
  RunConfig config_;
  dist::RunData data_;
  std::vector<int64_t> peaks_;
};

TEST_F(Plan, FullFineTuningRunsAsPlanned) {
  write_data(90);
  expect_every_layout_as_planned();
}

TEST_F(Plan, AdaptersRunAsPlanned) {
  train_adapters();
  write_data(90);
  expect_every_layout_as_planned();
}

TEST_F(Plan, SmolLm2RunsAsPlanned) {
  config_.model.config = SAFEGRAD_SOURCE_DIR "/benchmarks/smollm2-135m.json";
  config_.train.steps = 1;
  write_data(24);
  expect_run_as_planned(8);
  expect_run_as_planned(64);
  config_.parallel.shards = 8;
  expect_run_as_planned(1024);
  train_adapters();
  config_.parallel.shards = 0;
  for (int64_t ranks : {8, 64, 1024}) expect_run_as_planned(ranks);
  config_.parallel.shards = 1;
  expect_run_as_planned(8);
}

TEST_F(Plan, EveryKindOfRunIsAsPlanned) {
  write_data(60);
  const RunConfig base = config_;
  using Change = std::function<void(RunConfig&)>;
  auto adapters = [](RunConfig& c) {
    c.model.trainable.clear();
    c.model.lora = LoraConfig{};
  };
  const std::map<std::string, Change> kinds = {
      {"untied", [&](RunConfig& c) { c.model.config = folder_ / "untied.json"; }},
      {"q and k norms", [&](RunConfig& c) { c.model.config = folder_ / "qwen3.json"; }},
      {"a key for every head", [&](RunConfig& c) { c.model.config = folder_ / "ungrouped.json"; }},
      {"bfloat16", [](RunConfig& c) { c.model.dtype = ComputeDtype::bfloat16; }},
      {"bfloat16 gradients",
       [](RunConfig& c) {
         c.model.dtype = ComputeDtype::bfloat16;
         c.parallel.reduce_dtype = ComputeDtype::bfloat16;
       }},
      {"bfloat16 reduced", [](RunConfig& c) { c.parallel.reduce_dtype = ComputeDtype::bfloat16; }},
      {"recomputed", [](RunConfig& c) { c.parallel.recompute = Recompute::block; }},
      {"accumulated",
       [](RunConfig& c) {
         c.batch.max_tokens_per_rank = 61;
         c.batch.task_sequences = 17;
       }},
      {"two passes", [](RunConfig& c) { c.objective.gradients = GradientMode::two_pass; }},
      {"all positions", [](RunConfig& c) { c.objective.kl_positions = KlPositions::all; }},
      {"alignment now and then", [](RunConfig& c) { c.objective.align_every = 3; }},
      {"alignment now and then, in two passes",
       [](RunConfig& c) {
         c.objective.align_every = 2;
         c.objective.gradients = GradientMode::two_pass;
       }},
      {"scored", [](RunConfig& c) { c.objective.gate = 2; }},
      {"scored, untied, now and then",
       [&](RunConfig& c) {
         c.model.config = folder_ / "untied.json";
         c.objective.gate = 2;
         c.objective.align_every = 2;
       }},
      {"scored, q and k norms, in two passes of two micro-batches",
       [&](RunConfig& c) {
         c.model.config = folder_ / "qwen3.json";
         c.objective.gate = 2;
         c.objective.gradients = GradientMode::two_pass;
         c.batch.max_tokens_per_rank = 61;
         c.batch.task_sequences = 17;
       }},
      {"scored, one block alone, recomputed",
       [](RunConfig& c) {
         c.model.trainable = {".*layers.2.*"};
         c.objective.gate = 2;
         c.parallel.recompute = Recompute::block;
       }},
      {"scored, bfloat16",
       [](RunConfig& c) {
         c.model.dtype = ComputeDtype::bfloat16;
         c.objective.gate = 2;
       }},
      {"adapters, scored",
       [](RunConfig& c) {
         c.model.trainable.clear();
         c.model.lora = LoraConfig{.rank = 3,
                                   .dropout = 0.2,
                                   .targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                               "up_proj", "down_proj"}};
         c.objective.gate = 2;
         c.batch.task_sequences = 13;
       }},
      {"layer-wise", [](RunConfig& c) { c.objective.surgery = Surgery::block; }},
      {"turns, an alignment step",
       [](RunConfig& c) {
         c.objective.rule = Rule::lisa;
         c.objective.lisa = LisaConfig{1, 2, 0.5};
         c.batch.align_sequences = 31;
       }},
      {"turns, a task step",
       [&](RunConfig& c) {
         adapters(c);
         c.objective.rule = Rule::lisa;
         c.objective.lisa = LisaConfig{2, 1, 0.5};
         c.objective.align_loss = AlignLoss::sft;
         c.batch.align_sequences = 2;
       }},
      {"recorded by block", [](RunConfig& c) { c.objective.gram_per_block = true; }},
      {"no reference", [](RunConfig& c) { c.objective.align_loss = AlignLoss::sft; }},
      {"one objective",
       [](RunConfig& c) {
         c.objective.rule = Rule::sft;
         c.batch.align_sequences = 0;
       }},
      {"a likelihood probe",
       [](RunConfig& c) {
         c.objective.rule = Rule::sft;
         c.batch.align_sequences = 0;
         c.probe = {{"probe", c.data.align, 0}};
       }},
      {"head alone",
       [&](RunConfig& c) {
         c.model.config = folder_ / "untied.json";
         c.model.trainable = {"lm_head.*"};
       }},
      {"last block alone", [](RunConfig& c) { c.model.trainable = {".*layers.2.*"}; }},
      {"part of every block, the rest replicated",
       [](RunConfig& c) {
         c.model.trainable = {".*q_proj.*"};
         c.parallel.frozen = FrozenWeights::replicated;
       }},
      {"adapters everywhere",
       [](RunConfig& c) {
         c.model.trainable.clear();
         c.model.lora = LoraConfig{.rank = 3,
                                   .dropout = 0.2,
                                   .targets = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                               "up_proj", "down_proj"}};
       }},
      {"adapters, recomputed",
       [&](RunConfig& c) {
         adapters(c);
         c.parallel.frozen = FrozenWeights::replicated;
         c.parallel.recompute = Recompute::block;
       }},
      {"adapters in two passes",
       [&](RunConfig& c) {
         adapters(c);
         c.objective.gradients = GradientMode::two_pass;
       }},
  };
  for (const auto& [name, change] : kinds) {
    SCOPED_TRACE(name);
    for (int64_t shards : {1, 2, 4}) {
      config_ = base;
      change(config_);
      config_.parallel.shards = shards;
      expect_run_as_planned(4);
    }
  }
}

// By hand: embedding 1003·64 = 64,192; a block 2·64 norms, (64+32+32)·64 + 64·64 + 3·64·176 =
// 46,208; last norm 64; the reference's head 64,192. Fully sharded over 8 each is padded to a
// multiple of 8·16: shards of 8,032, 5,776, 16 and 8,032 elements.
TEST_F(Plan, RestingMemoryIsThatOfAHandCalculation) {
  write_data(60);
  const int64_t trained = 8032 + 3 * 5776 + 16, frozen = 8032;
  const RankPlan p = plan(8);

  EXPECT_EQ(p.trained, 64192 + 3 * 46208 + 64);
  EXPECT_EQ(p.memory.largest.weights, 4 * (trained + frozen));
  EXPECT_EQ(p.memory.largest.optimizer, 2 * 4 * trained);
  EXPECT_EQ(p.memory.largest.gradients, 2 * 4 * trained);
}

// Gathers of a step: embedding twice, each block twice, last norm and reference head once;
// reductions: both gradients of every unit. Each sends 7 shards. Scalars: 2 losses, FLOPs, 2 words
// of notice, 4 of the Gram matrix, fp64.
TEST_F(Plan, TrafficIsThatOfAHandCalculation) {
  write_data(60);
  const RankPlan p = plan(8);

  const int64_t gathered = 2 * 8032 + 6 * 5776 + 16 + 8032, reduced = 2 * (8032 + 3 * 5776 + 16);
  EXPECT_EQ(p.traffic.at("all_gather").calls, 2 + 6 + 1 + 1);
  EXPECT_EQ(p.traffic.at("all_gather").bytes, 7 * 4 * gathered);
  EXPECT_EQ(p.traffic.at("reduce_scatter").calls, 2 * 5);
  EXPECT_EQ(p.traffic.at("reduce_scatter").bytes, 7 * 4 * reduced);
  EXPECT_EQ(p.traffic.at("scalars").bytes, 7 * 10 * 8);
  EXPECT_FALSE(p.traffic.contains("all_reduce"));
}

// A chunk of 256 rows of 1,003 words, in float32, twice for the KL.
TEST_F(Plan, LogitsAreThoseOfOneChunk) {
  write_random_tokens(config_.data.task, {8, 400, 300, 1000, 1});
  write_random_tokens(config_.data.align, {8, 400, 300, 1000, 2});

  EXPECT_EQ(plan(1).memory.largest.logits, 2 * 256 * 1003 * 4);
}

// 12 bytes for each of the trained elements of the shard above, beside the tensors of a CPU rank,
// in another memory than a card's.
TEST_F(Plan, ACheckpointsCopyIsHeldBesideTheStep) {
  write_data(60);
  const RankPlan without = plan(8);
  config_.checkpoint.every_steps = 2;
  auto model = open();
  dist::PlanInput in = input(model);
  const RankPlan with = dist::plan_rank(*model.decoder, in, 8);
  const int64_t copy = 12 * (8032 + 3 * 5776 + 16);

  EXPECT_EQ(without.memory.largest.checkpoint, 0);
  EXPECT_EQ(with.memory.largest.checkpoint, copy);
  EXPECT_EQ(with.memory.peak(), without.memory.peak() + copy);
  EXPECT_NE(memory_in_words(with.memory).find(", checkpoint "), std::string::npos);
  check_run(with, run_rank(config_, model, data_, with));

  in.config.objective.align_every = 2;  // with the alignment gradient
  EXPECT_EQ(dist::plan_rank(*model.decoder, in, 8).memory.largest.checkpoint, copy / 12 * 16);
  in.config.objective.align_every = 1;
  in.config.objective.gate = 1;
  EXPECT_EQ(dist::plan_rank(*model.decoder, in, 8).memory.largest.checkpoint, copy / 12 * 16);
  in.config.objective.gate = 0;

  in.device.reserve_gib = 0;
  in.device.memory_gib = 1.0 / 64;
  const int64_t beside_copy = dist::plan_rank(*model.decoder, in, 8).largest_micro_batch;
  in.config.checkpoint.every_steps = 0;
  EXPECT_LT(beside_copy, dist::plan_rank(*model.decoder, in, 8).largest_micro_batch);

  in.config.checkpoint.every_steps = 2;
  in.kernels.gpu = true;
  const RankPlan card = dist::plan_rank(*model.decoder, in, 8);
  EXPECT_EQ(card.memory.largest.checkpoint, 0);
  EXPECT_EQ(card.host_checkpoint_bytes, copy);
}

// Rank 0 has the longest sequence, rank 1 the two others and so more tokens; rank 0 writes.
TEST_F(Plan, RanksOutsideTheFirstReplicaHoldNoCopy) {
  write_random_tokens(config_.data.task, {3, 60, 30, 1000, 1});
  config_.objective.rule = Rule::sft;
  config_.batch.task_sequences = 3;
  config_.batch.align_sequences = 0;
  config_.train.steps = 1;
  config_.parallel.shards = 1;
  const auto model = open();
  dist::PlanInput in = input(model);
  in.streams[0].lengths[1] = 100;
  EXPECT_EQ(dist::plan_rank(*model.decoder, in, 2).rank, 1);
  in.config.checkpoint.every_steps = 1;
  EXPECT_EQ(dist::plan_rank(*model.decoder, in, 2).rank, 0);
}

// Steps of two short sequences; the reference's pass and the probe's fill a micro-batch.
TEST_F(Plan, WhatFitsIsAskedOfTheReferencesPassAndProbesToo) {
  write_random_tokens(config_.data.task, {8, 10, 5, 1000, 1});
  write_random_tokens(config_.data.align, {200, 90, 5, 1000, 2});
  config_.batch.task_sequences = config_.batch.align_sequences = 1;
  const auto model = open();
  for (bool probe : {false, true}) {
    if (probe) {
      config_.objective.rule = Rule::sft;
      config_.batch.align_sequences = 0;
      config_.probe = {{"probe", config_.data.align, 0}};
    }
    dist::PlanInput in = input(model);
    in.device.reserve_gib = 0;
    in.device.memory_gib = 1;
    const RankPlan p = dist::plan_rank(*model.decoder, in, 1);
    ASSERT_GT(p.reference_pass.peak(), p.memory.peak()) << "else nothing is shown";
    EXPECT_TRUE(p.fits());
    EXPECT_EQ(p.probe_pass.peak() > 0, probe);
    EXPECT_EQ(dist::plan_memory(*model.decoder, in, 1).peak(), p.peak());

    const int64_t between = (p.memory.peak() + p.reference_pass.peak()) / 2;
    in.device.memory_gib = static_cast<double>(between) / (1 << 30);
    const RankPlan small = dist::plan_rank(*model.decoder, in, 1);
    EXPECT_FALSE(small.fits());
    EXPECT_NE(plan_in_full({}, small).find("the reference's pass DOES NOT FIT"), std::string::npos);
    EXPECT_NE(plan_table({}, {{small.ranks, small, ""}}).find("DOES NOT FIT"), std::string::npos);
    EXPECT_NE(plan_json({}, small, nullptr).find(R"("fits":false)"), std::string::npos);
  }
}

// The run is one of the plan, and then of one that lacks or has a collective too many.
TEST_F(Plan, ACollectiveThatIsInThePlanOrTheRunAloneIsAnError) {
  write_data(60);
  auto model = open();
  const RankPlan p = dist::plan_rank(*model.decoder, input(model), 4);
  const RankRun run = run_rank(config_, model, data_, p);
  ASSERT_NO_THROW(check_run(p, run));

  RankRun more = run, fewer = run;
  more.traffic["all_reduce"] = {1, 8};
  fewer.traffic.erase("reduce_scatter");
  EXPECT_THROW(check_run(p, more), RunError);
  EXPECT_THROW(check_run(p, fewer), RunError);
}

// One long sequence, drawn late.
TEST_F(Plan, ALateStepCountsAsWell) {
  write_random_tokens(config_.data.task, {40, 60, 30, 1000, 1});
  write_random_tokens(config_.data.align, {20, 60, 30, 1000, 2});
  config_.batch.task_sequences = config_.batch.align_sequences = 1;
  config_.train.steps = 40;
  const auto model = open();
  dist::PlanInput in = input(model);
  const int64_t late = 30;
  const int64_t sample =
      dist::make_planner(config_, in.streams, in.task_sequences, *model.decoder, 1)
          .draws(late)[0]
          .sample;
  in.streams[0].lengths[static_cast<size_t>(sample)] = 400;
  const RankPlan p = dist::plan_rank(*model.decoder, in, 1);

  EXPECT_EQ(p.step, late);
  EXPECT_EQ(p.steps_seen, 40);
  EXPECT_EQ(p.tokens, 460);
  EXPECT_EQ(dist::steps_seen(100'000, 1024), 64);
  EXPECT_EQ(dist::steps_seen(100'000, 1'000'000), 16);
}

// The longest sequence is the second step's, in which the KL's gradient is computed as well.
TEST_F(Plan, TheSecondStepHasTheKlsGradientToo) {
  write_random_tokens(config_.data.task, {40, 60, 30, 1000, 1});
  write_random_tokens(config_.data.align, {20, 60, 30, 1000, 2});
  config_.batch.task_sequences = config_.batch.align_sequences = 1;
  config_.train.steps = 7;
  config_.objective.align_every = 4;
  for (const bool kl : {true, false}) {
    config_.objective.align_loss = kl ? AlignLoss::kl : AlignLoss::sft;
    const auto model = open();
    dist::PlanInput in = input(model);
    const int64_t sample =
        dist::make_planner(config_, in.streams, in.task_sequences, *model.decoder, 1)
            .draws(1)[0]
            .sample;
    in.streams[0].lengths[static_cast<size_t>(sample)] = 400;
    const RankPlan p = dist::plan_rank(*model.decoder, in, 1);

    EXPECT_EQ(p.step, 1);
    EXPECT_EQ(p.renews, kl);
    EXPECT_EQ(p.align_tokens, kl ? 60 : 0);
    std::vector<int64_t> renewals;
    for (int64_t step = 0; step < 7; ++step) {
      if (dist::renews_alignment(config_.objective, step)) renewals.push_back(step);
    }
    EXPECT_EQ(renewals, kl ? (std::vector<int64_t>{0, 1, 4}) : (std::vector<int64_t>{0, 4}));
  }
}

// The same rows in one objective and in two: what is read and written differs by the gradients.
TEST_F(Plan, EveryRowsLogitsAreSweptOnce) {
  write_random_tokens(config_.data.task, {13, 90, 45, 1000, 1});
  write_random_tokens(config_.data.align, {13, 90, 45, 1000, 2});
  config_.objective.align_loss = AlignLoss::sft;
  auto swept_beside_gradients = [&] {
    const auto model = open();
    const dist::PlanInput in = input(model);
    const RankPlan p = dist::plan_rank(*model.decoder, in, 1);
    return p.time.memory_s * in.device.memory_gb_per_s * 1e9 -
           2.0 * static_cast<double>(p.memory.largest.gradients);
  };
  const double two = swept_beside_gradients();
  config_.objective.rule = Rule::sft;
  config_.batch.task_sequences = 13;
  config_.batch.align_sequences = 0;

  EXPECT_NEAR(two / swept_beside_gradients(), 1.0, 1e-9) << "sums of integers, in doubles";
}

TEST(MachineMemory, AContainersLimitCounts) {
  const test::TempFolder root;
  const int64_t all = machine_memory(root.path());
  ASSERT_GT(all, 1 << 20) << "nothing there: the machine's own";
  for (const char* folder : {"/proc/self", "/sys/fs/cgroup/job/part", "/sys/fs/cgroup/memory/old"})
    std::filesystem::create_directories(root.path() + folder);
  const std::string tree = root / "sys/fs/cgroup";

  test::write_text(root / "proc/self/cgroup", "0::/job/part\n");
  test::write_text(tree + "/job/part/memory.max", "max\n");
  EXPECT_EQ(machine_memory(root.path()), all);
  test::write_text(tree + "/job/memory.max", "900000\n");
  EXPECT_EQ(machine_memory(root.path()), 900000) << "of the group above";
  test::write_text(root / "proc/self/cgroup", "0::/not/mounted/here\n");
  EXPECT_EQ(machine_memory(root.path()), all);
  test::write_text(tree + "/memory.max", "800000\n");
  EXPECT_EQ(machine_memory(root.path()), 800000) << "what a container sees as its root";

  test::write_text(root / "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/old\n");
  test::write_text(tree + "/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(machine_memory(root.path()), all);
  test::write_text(tree + "/memory/old/memory.limit_in_bytes", "700000\n");
  EXPECT_EQ(machine_memory(root.path()), 700000);
}

TEST(MachineMemory, ThePeakOfAProcessIsWhatItsStatusSays) {
  const test::TempFolder root;
  EXPECT_EQ(peak_resident_bytes(root.path()), 0) << "not known";
  std::filesystem::create_directories(root / "proc/self");
  test::write_text(root / "proc/self/status",
                   "Name:\tVmHWM: 3 kB\nVmPeak:\t 9000 kB\nVmHWM:\t    1964 kB\nVmRSS:\t 12 kB\n");
  EXPECT_EQ(peak_resident_bytes(root.path()), int64_t{1964} * 1024);

  // Of this process: no less than it holds now, no more than the system's other count.
  const std::vector<char> touched(64 << 20, 'x');
  int64_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  resident *= sysconf(_SC_PAGE_SIZE);
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  ASSERT_GT(resident, static_cast<int64_t>(touched.size()));
  constexpr int64_t kSlack = 1 << 20;  // the kernel counts pages in batches a thread
  EXPECT_GE(peak_resident_bytes(""), resident - kSlack);
  EXPECT_LE(peak_resident_bytes(""), int64_t{usage.ru_maxrss} * 1024 + kSlack);
}

class LargestMicroBatch : public Plan, public ::testing::WithParamInterface<GradientMode> {};
INSTANTIATE_TEST_SUITE_P(Modes, LargestMicroBatch,
                         ::testing::Values(GradientMode::one_pass, GradientMode::two_pass));

TEST_P(LargestMicroBatch, FitsAndALargerOneDoesNot) {
  config_.objective.gradients = GetParam();
  write_data(60);
  const auto model = open();
  dist::PlanInput in = input(model);
  in.device.reserve_gib = 0;
  in.device.memory_gib = 0.25;
  const RankPlan p = dist::plan_rank(*model.decoder, in, 8);
  ASSERT_GT(p.largest_micro_batch, 1000);

  // The same data in micro-batches of that many tokens, all on one rank.
  for (double factor : {0.98, 1.1}) {
    dist::PlanInput full = in;
    const auto tokens = static_cast<int64_t>(factor * static_cast<double>(p.largest_micro_batch));
    full.config.batch.max_tokens_per_rank = tokens;
    full.config.batch.task_sequences = 8 * 8 * tokens / 60;
    full.config.batch.align_sequences = 5 * 8 * tokens / 60;
    full.streams[0].per_step = full.config.batch.task_sequences;
    full.streams[1].per_step = full.config.batch.align_sequences;
    full.config.train.steps = 1;
    const RankPlan at = dist::plan_rank(*model.decoder, full, 8);
    EXPECT_EQ(at.memory.peak() <= at.device_bytes, factor < 1) << at.memory.peak();
  }
}

TEST_F(Plan, RanksWithoutSequencesAreTold) {
  write_data(60);
  EXPECT_EQ(plan(8).idle_ranks, 0);
  EXPECT_EQ(plan(64).idle_ranks, 64 - 13);
}

TEST_F(Plan, RanksOfOneMachineGatherInPlace) {
  write_data(60);
  const auto model = open();
  dist::PlanInput in = input(model);
  const RankPlan apart = dist::plan_rank(*model.decoder, in, 4);
  in.separate_machines = false;
  in.device.ranks_per_node = 4;
  const RankPlan together = dist::plan_rank(*model.decoder, in, 4);

  EXPECT_EQ(apart.transport, dist::Transport::messages);
  EXPECT_EQ(together.transport, dist::Transport::shared_memory);
  // What a gather would write: two blocks, twice the embedding's size (and the reference's), a
  // norm.
  EXPECT_LT(together.memory.largest.buffers, apart.memory.largest.buffers - 2 * 4 * 46208);
  EXPECT_EQ(together.traffic.at("all_gather").bytes, apart.traffic.at("all_gather").bytes);
}

TEST(StepTime, EachCollectiveIsAsFastAsTheSlowestLinkThatItCrosses) {
  const Hardware hardware{{}, {{"near", {100, 1, 0}}, {"far", {10, 1, 0}}}};
  DeviceFigures device;
  device.memory_gb_per_s = 1;
  device.ranks_per_node = 8;
  device.inside = "near";
  device.between = "far";
  dist::StepWork work;
  work.traffic["all_gather"] = {1, 30'000'000'000};
  auto gather_s = [&](int64_t ranks, dist::Transport transport) {
    return dist::step_time(work, {ranks, ranks, transport}, device, hardware, 1.0)
        .by_collective.at("all_gather");
  };

  EXPECT_DOUBLE_EQ(gather_s(8, dist::Transport::nccl), 0.3) << "inside one machine";
  // A ring enters each of two machines once for its 8 ranks, which have a link each.
  EXPECT_DOUBLE_EQ(gather_s(16, dist::Transport::nccl), std::max(0.3, 3.0 / 8));
  // By message a rank sends to 8 of 15 peers over its own link.
  EXPECT_DOUBLE_EQ(gather_s(16, dist::Transport::messages), 3.0 * 8 / 15);
  EXPECT_DOUBLE_EQ(gather_s(8, dist::Transport::shared_memory), 0);
}

TEST(StepTime, WorkHidesGathersWhereTheDeviceOverlaps) {
  const Hardware hardware{{}, {{"link", {1, 1, 0}}}};
  DeviceFigures device;
  device.memory_gb_per_s = 1;
  device.inside = device.between = "link";
  dist::StepWork work;
  work.flops = 10;
  work.traffic["all_gather"] = {1, 4'000'000'000};
  work.traffic["all_reduce"] = {1, 2'000'000'000};
  const dist::Layout layout{4, 2, dist::Transport::nccl};
  const double apart = dist::step_time(work, layout, device, hardware, 1.0).total_s;
  device.overlaps = true;
  const dist::StepTime time = dist::step_time(work, layout, device, hardware, 1.0);

  EXPECT_DOUBLE_EQ(apart, 10 + 4 + 2);
  EXPECT_DOUBLE_EQ(time.total_s, 10 + 2);
  EXPECT_EQ(time.bottleneck, "matrix products");
  work.flops = 1;
  EXPECT_EQ(dist::step_time(work, layout, device, hardware, 1.0).bottleneck,
            "all_gather over link");
}

}  // namespace
}  // namespace safegrad
