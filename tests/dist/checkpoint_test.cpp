// checkpoint_test.cpp: a run that stops and goes on is the run that did not, on any layout; nothing
// damaged is taken up.
#include "dist/checkpoint.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <thread>

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"
#include "core/files.h"
#include "core/safetensors.h"
#include "dist/job_failed.h"
#include "dist/rank_main.h"
#include "dist/tiny_job.h"
#include "unit/temp_folder.h"

namespace safegrad::testing {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kStop = 6,
                  kSteps = 12;  // 11 task sequences, 5 a step: the stop is inside an epoch

void expect_same_bits(const std::vector<StepRecord>& a, const std::vector<StepRecord>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isnan(a[i].loss_task) || !std::isnan(b[i].loss_task)) {
      EXPECT_EQ(a[i].loss_task, b[i].loss_task) << "record " << i;
    }
    EXPECT_EQ(a[i].loss_align, b[i].loss_align) << "record " << i;
    EXPECT_EQ(a[i].ua, b[i].ua) << "record " << i;
    EXPECT_EQ(a[i].grad_norm, b[i].grad_norm) << "record " << i;
    EXPECT_EQ(a[i].lr, b[i].lr) << "record " << i;
    EXPECT_EQ(a[i].epoch, b[i].epoch) << "record " << i;
    EXPECT_EQ(a[i].gated, b[i].gated) << "record " << i;
  }
}

/// Weights and moments of this rank, bit by bit.
std::vector<float> state_of(TinyJob& job) {
  std::vector<float> all;
  for (const dist::ShardedUnit& unit : job.trainer->engine().units()) {
    if (!unit.trains()) continue;
    for (const at::Tensor& t : unit.state().tensors) {
      const at::Tensor flat = t.cpu();
      all.insert(all.end(), flat.const_data_ptr<float>(),
                 flat.const_data_ptr<float>() + flat.numel());
    }
  }
  return all;
}

/// What a checkpoint holds, put together from its shards: nothing of it depends on their number.
std::map<std::string, std::vector<float>> contents(const std::string& folder) {
  const dist::Manifest manifest = dist::verify_checkpoint(folder, 0, 1);
  std::map<std::string, std::vector<float>> whole;
  for (int64_t i = 0; i < manifest.shards; ++i) {
    const SafetensorsFile file(folder + "/" + dist::shard_name(i, manifest.shards));
    for (const auto& [name, view] : file.tensors()) {
      std::vector<float>& values = whole[name];
      const auto before = static_cast<int64_t>(values.size());
      values.resize(static_cast<size_t>(before + view.numel()));
      read_as_float(view, 0, view.numel(), values.data() + before);
    }
  }
  return whole;
}

class Checkpoints : public ::testing::Test {
 protected:
  Checkpoints() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig config(const std::string& gold = "qwen2") {
    RunConfig c = tiny_config(gold, folder_.path());
    c.checkpoint.every_steps = 1;
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
    return c;
  }
  static RunConfig with_lora(RunConfig c) {
    c.model.trainable.clear();
    c.model.lora = LoraConfig{
        .rank = 4, .alpha = 8, .dropout = 0.2, .targets = {"q_proj", "v_proj", "down_proj"}};
    c.optimizer.lr = 1e-2;
    return c;
  }
  std::string folder() const { return folder_.path() + "/run/checkpoints"; }
  std::string saved(int64_t step = kStop) const {
    return folder() + "/" + dist::checkpoint_name(step);
  }

  // Of a run that goes on from the newest checkpoint.
  std::unique_ptr<dist::CheckpointWriter> writer_for(TinyJob& job) {
    dist::Manifest facts;
    const std::vector<int64_t> steps = dist::list_checkpoints(folder());
    facts.step = steps.empty() ? 0 : steps.back();
    return std::make_unique<dist::CheckpointWriter>(*job.trainer, job.mesh, folder(),
                                                    job.config.checkpoint, facts, heartbeat_);
  }
  void save(TinyJob& job, int64_t step = kStop) {
    const auto writer = writer_for(job);
    writer->start(step);
    writer->finish();
  }
  static void restore(TinyJob& job, const std::string& from) {
    dist::Communicator& world = job.mesh.world();
    dist::restore_checkpoint(*job.trainer, job.mesh, from,
                             dist::verify_checkpoint(from, world.rank(), world.size()));
  }
  /// The ranks below `ranks` of the job, on separate machines; null on the others. Collective.
  std::unique_ptr<dist::Communicator> first(int ranks) {
    auto part = all_->split(all_->rank() < ranks);
    return all_->rank() < ranks ? std::move(part) : nullptr;
  }

  /// k steps, a checkpoint, a new trainer, k steps: the same bits as 2k steps.
  void expect_nothing_lost(const RunConfig& c) {
    TinyJob whole(c, world());
    whole.run(0, kStop);
    const auto expected = whole.run(kStop, kSteps);
    {
      TinyJob before(c, world());
      before.run(0, kStop);
      save(before);
    }
    TinyJob after(c, world());
    const std::vector<float> start = state_of(after);
    restore(after, saved());
    if (!start.empty()) {
      EXPECT_NE(state_of(after), start) << "the state must have moved";
    }
    const auto resumed = after.run(kStop, kSteps);

    expect_same_bits(resumed, expected);
    EXPECT_EQ(state_of(after), state_of(whole));
    EXPECT_EQ(after.weights(), whole.weights());
    all_->barrier();
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
  dist::Heartbeat heartbeat_;
};

TEST_F(Checkpoints, FullFineTuningGoesOnToTheBit) {
  RunConfig c = config();
  c.schedule = {ScheduleKind::cosine, 3};
  c.optimizer.weight_decay = 0.1;
  expect_nothing_lost(c);
}

TEST_F(Checkpoints, LoraWithDropoutGoesOnToTheBit) {
  const RunConfig c = with_lora(config());
  RunConfig calm = c;
  calm.model.lora->dropout = 0;
  TinyJob with(c, world()), without(calm, world());
  ASSERT_NE(with.run(0, 2)[1].loss_task, without.run(0, 2)[1].loss_task) << "dropout must matter";
  expect_nothing_lost(c);
}

TEST_F(Checkpoints, SeveralMicroBatchesGoOnToTheBit) {
  RunConfig c = config();
  c.batch.max_tokens_per_rank = 45;  // 8 sequences of up to 40 tokens
  expect_nothing_lost(c);
}

TEST_F(Checkpoints, Bfloat16GoesOnToTheBit) {
  RunConfig c = config();
  c.model.dtype = ComputeDtype::bfloat16;
  expect_nothing_lost(c);
}

TEST_F(Checkpoints, EveryShardingGoesOnToTheBit) {
  for (int64_t shards = 1; shards < all_->size(); ++shards) {
    if (all_->size() % shards != 0) continue;
    SCOPED_TRACE(fmt::format("shards {}", shards));
    RunConfig c = config("llama_tied");
    c.parallel.shards = shards;
    expect_nothing_lost(c);
  }
}

// The stop is between two renewals, or right before one.
TEST_F(Checkpoints, AnAlignmentGradientThatIsUsedAgainGoesOnToTheBit) {
  for (const int64_t every : {4, 3}) {
    for (const bool lora : {false, true}) {
      SCOPED_TRACE(fmt::format("every {}{}", every, lora ? ", LoRA" : ""));
      RunConfig c = lora ? with_lora(config()) : config();
      c.objective.align_every = every;
      expect_nothing_lost(c);
      size_t held = 0;
      for (const auto& [name, values] : contents(saved())) held += name.ends_with(".align");
      EXPECT_EQ(held > 0, kStop % every != 0);
      all_->barrier();
    }
  }
}

// 40 samples, 10 a step: the stop is inside the second epoch. Scores are compared as bits, since
// some are still NaN.
TEST_F(Checkpoints, AGateGoesOnToTheBitOnAnyLayout) {
  for (const bool lora : {false, true}) {
    SCOPED_TRACE(lora ? "LoRA" : "full");
    RunConfig c = lora ? with_lora(config()) : config();
    c.objective.gate = 0.2;
    c.objective.align_loss = AlignLoss::sft;  // has a direction from the second step on
    c.batch.task_sequences = 10;
    if (all_->rank() == 0) write_random_token_file(c.data.task, 40, 64, 4, false);
    all_->barrier();
    auto bits = [](TinyJob& job) {
      std::vector<uint64_t> words;
      for (const double score : job.trainer->gate()->scores())
        words.push_back(std::bit_cast<uint64_t>(score));
      return words;
    };
    expect_nothing_lost(c);

    TinyJob whole(c, world());
    whole.run(0, kStop);
    const std::vector<uint64_t> at_stop = bits(whole);
    const double aa = whole.trainer->kept_for(kStop).value().aa;
    const auto expected = whole.run(kStop, kSteps);
    int64_t gated = 0;
    for (const StepRecord& record : expected) gated += *record.gated;
    ASSERT_GT(gated, 3);
    ASSERT_NE(bits(whole), at_stop);

    RunConfig other = c;
    other.parallel.shards = 1;
    TinyJob moved(other, world());
    restore(moved, saved());
    EXPECT_EQ(bits(moved), at_stop);
    EXPECT_EQ(moved.trainer->kept_for(kStop).value().aa, aa);
    const auto records = moved.run(kStop, kSteps);
    EXPECT_EQ(records[0].gated, expected[0].gated) << "decided by what was saved";
    for (size_t i = 0; i < records.size(); ++i)
      EXPECT_NEAR(records[i].loss_task / expected[i].loss_task, 1.0, 1e-5) << "record " << i;

    // Without the table the first step would run all that it draws.
    ASSERT_GT(*expected[0].gated, 0);
    RunConfig fewer = c;
    fewer.data.task = folder_.path() + "/fewer.safetensors";
    if (all_->rank() == 0) write_random_token_file(fewer.data.task, 39, 64, 4, false);
    all_->barrier();
    TinyJob refused(fewer, world());
    try {
      restore(refused, saved());
      FAIL() << "scores of 40 samples for 39";
    } catch (const dist::JobFailed& error) {
      const bool speaks =
          std::string(error.what()).find("gate.scores has 40 numbers") != std::string::npos;
      EXPECT_EQ(speaks, all_->rank() == 0) << error.what();
    }
    all_->barrier();
  }
}

// The stop is inside of a phase of the task, of one of the alignment, and between two.
TEST_F(Checkpoints, LisaGoesOnToTheBit) {
  for (const LisaConfig& phases :
       {LisaConfig{2, 3, 0.5}, LisaConfig{5, 4, 0.5}, LisaConfig{2, 4, 0.5}}) {
    for (const bool lora : {false, true}) {
      SCOPED_TRACE(fmt::format("{} + {} steps{}", phases.align_steps, phases.task_steps,
                               lora ? ", LoRA" : ""));
      RunConfig c = lora ? with_lora(config()) : config();
      c.objective.rule = Rule::lisa;
      c.objective.align_loss = AlignLoss::sft;
      c.objective.lisa = phases;
      expect_nothing_lost(c);
      size_t anchors = 0;
      for (const auto& [name, values] : contents(saved())) anchors += name.ends_with(".anchor");
      const int64_t at = kStop % (phases.align_steps + phases.task_steps);
      EXPECT_EQ(anchors > 0, at != 0 && at != phases.align_steps);
      all_->barrier();
    }
  }
}

// What AdamW's t counts is not the step: skipped steps must not come back as counted ones.
TEST_F(Checkpoints, SkippedStepsStaySkipped) {
  const RunConfig c = config();
  TinyJob job(c, world());
  job.run(0, 2);
  job.trainer->set_updates(1);  // as if the second had been skipped
  save(job, 2);
  TinyJob after(c, world());
  restore(after, saved(2));

  EXPECT_EQ(after.trainer->updates(), 1);
  expect_same_bits(after.run(2, 4), job.run(2, 4));
  TinyJob counted(c, world());
  counted.run(0, 4);
  EXPECT_NE(after.weights(), counted.weights()) << "t must matter";
}

struct Layout {
  int ranks;
  int64_t shards;
};

TEST_F(Checkpoints, AnyLayoutGoesOnFromAnyOther) {
  const std::vector<std::pair<Layout, Layout>> moves = {
      {{4, 4}, {2, 2}}, {{2, 2}, {3, 3}}, {{1, 1}, {4, 4}}, {{4, 4}, {4, 1}}, {{4, 1}, {4, 2}},
      {{4, 2}, {4, 4}}, {{4, 2}, {1, 1}}, {{3, 3}, {2, 1}}, {{2, 1}, {2, 2}}, {{2, 2}, {1, 1}}};
  int64_t moved = 0;
  for (const bool lora : {false, true}) {
    for (const auto& [from, to] : moves) {
      if (std::max(from.ranks, to.ranks) > all_->size()) continue;
      SCOPED_TRACE(fmt::format("{} ranks in {} shards -> {} in {}{}", from.ranks, from.shards,
                               to.ranks, to.shards, lora ? ", LoRA" : ""));
      RunConfig base = lora ? with_lora(config()) : config();
      base.objective.align_every = lora ? 1 : 4;  // the stop is between renewals
      std::vector<StepRecord> expected;
      std::vector<float> weights;
      if (auto ranks = first(from.ranks)) {
        RunConfig c = base;
        c.parallel.shards = from.shards;
        TinyJob job(c, std::move(ranks));
        job.run(0, kStop);
        save(job);
        weights = job.weights();
        expected = job.run(kStop, kSteps);
      }
      all_->barrier();
      const auto before = contents(saved());
      all_->barrier();
      if (auto ranks = first(to.ranks)) {
        RunConfig c = base;
        c.parallel.shards = to.shards;
        TinyJob job(c, std::move(ranks));
        restore(job, saved());
        if (all_->rank() == 0) {
          EXPECT_EQ(job.weights(), weights);
        } else {
          job.weights();  // gathering them takes all ranks
        }
        save(job, kStop + 1);
        EXPECT_EQ(contents(saved(kStop + 1)), before)
            << "master, m, v and the alignment gradient to the bit";
        const auto resumed = job.run(kStop, kSteps);
        // Float32 gradients summed in another order; 1e-5 is the promise.
        for (size_t i = 0; i < expected.size(); ++i)
          EXPECT_NEAR(resumed[i].loss_task / expected[i].loss_task, 1.0, 1e-5) << "record " << i;
        EXPECT_EQ(job.trainer->updates(), kSteps);
      }
      ++moved;
      all_->barrier();
    }
  }
  if (all_->size() == 4) {
    EXPECT_EQ(moved, 20);
  }
}

TEST_F(Checkpoints, ACopyIsWrittenAndNotWhatTrainingMakesOfIt) {
  const RunConfig c = config();
  TinyJob job(c, world());
  job.run(0, 2);
  save(job, 2);
  const auto writer = writer_for(job);
  writer->start(3);
  job.run(2, kSteps);  // the writer's thread is at work, or not yet
  writer->finish();

  EXPECT_EQ(contents(saved(3)), contents(saved(2)));
}

TEST_F(Checkpoints, AnotherSetOfTrainedWeightsIsRefused) {
  const RunConfig c = config();
  TinyJob job(c, world());
  save(job);
  RunConfig other = c;
  other.model.trainable = {".*\\.q_proj\\..*"};
  TinyJob part(other, world());
  const std::vector<float> before = state_of(part);

  EXPECT_THROW(restore(part, saved()), dist::JobFailed);
  EXPECT_EQ(state_of(part), before);
}

TEST_F(Checkpoints, ADiskThatRefusesEndsTheJobOnEveryRankAndLeavesTheLastOneWhole) {
  const RunConfig c = config();
  TinyJob job(c, world());
  save(job, 1);
  const auto before = contents(saved(1));
  all_->barrier();
  // A file where the folder would be: refused for root too. Only the last writer meets it.
  const int last = job.mesh.shards() - 1;
  const std::string in_the_way =
      fmt::format("{}.tmp/{}.tmp", saved(2), dist::shard_name(last, job.mesh.shards()));
  dist::CheckpointWriter writer(*job.trainer, job.mesh, folder(), c.checkpoint, {}, heartbeat_);
  if (all_->rank() == 0) fs::create_directories(in_the_way);
  all_->barrier();

  writer.start(2);
  std::string message;
  try {
    writer.finish();
    ADD_FAILURE() << "rank " << all_->rank() << " went on";
  } catch (const dist::JobFailed& failed) {
    message = failed.what();
    EXPECT_EQ(failed.exit_code(), 2);
  }
  if (all_->rank() == last) {
    EXPECT_NE(message.find(in_the_way + ": cannot create: Is a directory"), std::string::npos)
        << message;
  }
  all_->barrier();
  EXPECT_EQ(dist::list_checkpoints(folder()), std::vector<int64_t>{1});
  EXPECT_EQ(contents(saved(1)), before);
}

TEST_F(Checkpoints, ARankThatGetsNoThreadTakesTheOthersWithIt) {
  const RunConfig c = config();
  TinyJob job(c, world());
  const auto writer = writer_for(job);
  const int last = job.mesh.shards() - 1;
  pthread_attr_t usual, greedy;
  ASSERT_EQ(pthread_getattr_default_np(&usual), 0);
  ASSERT_EQ(pthread_getattr_default_np(&greedy), 0);
  // A stack that no address space has room for.
  ASSERT_EQ(pthread_attr_setstacksize(&greedy, size_t{1} << 60), 0);
  if (all_->rank() == last) {
    ASSERT_EQ(pthread_setattr_default_np(&greedy), 0);
  }
  std::string message;
  try {
    writer->start(2);
    ADD_FAILURE() << "rank " << all_->rank() << " went on";
  } catch (const dist::JobFailed& failed) {
    message = failed.what();
    EXPECT_EQ(failed.exit_code(), 2);
  }
  pthread_setattr_default_np(&usual);

  EXPECT_EQ(message.find(fmt::format("rank {}: cannot begin the checkpoint after step 2", last)),
            all_->rank() == last ? 0 : std::string::npos)
      << message;
}

// As on several hosts whose output folders are disks of their own.
TEST_F(Checkpoints, ShardsThatRankZeroDoesNotSeeAreNoCheckpoint) {
  if (all_->size() == 1) GTEST_SKIP() << "all shards are rank 0's";
  const RunConfig c = config();
  TinyJob job(c, world());
  const std::string own = fmt::format("{}/disk-{}", folder_.path(), all_->rank());
  dist::CheckpointWriter writer(*job.trainer, job.mesh, own, c.checkpoint, {}, heartbeat_);
  writer.start(2);
  std::string message;
  try {
    writer.finish();
    ADD_FAILURE() << "rank " << all_->rank() << " went on";
  } catch (const dist::JobFailed& failed) {
    message = failed.what();
  }
  if (all_->rank() == 0) {
    EXPECT_NE(message.find("rank 1 wrote a shard that rank 0 does not see"), std::string::npos);
    EXPECT_NE(message.find("a file system that all ranks share"), std::string::npos) << message;
  }
  EXPECT_TRUE(dist::list_checkpoints(own).empty());
}

TEST_F(Checkpoints, WhatMustNotBeOlderIsBroughtToTheDiskFirst) {
  const RunConfig c = config();
  TinyJob job(c, world());
  int64_t calls = 0;
  bool sealed_before = false;
  dist::CheckpointWriter writer(*job.trainer, job.mesh, folder(), c.checkpoint, {}, heartbeat_,
                                [&] {
                                  ++calls;
                                  sealed_before = fs::exists(saved(2));
                                });
  writer.start(2);
  writer.finish();

  EXPECT_EQ(calls, all_->rank() == 0 ? 1 : 0);
  EXPECT_FALSE(sealed_before);
  EXPECT_TRUE(fs::exists(saved(2)));
}

TEST_F(Checkpoints, AWriterThatGoesAwayBreaksOff) {
  if (all_->size() != 1) GTEST_SKIP() << "one rank is enough";
  const RunConfig c = config();
  TinyJob job(c, world());
  const std::string unfinished = saved(2) + ".tmp/";
  auto writer = writer_for(job);
  fs::create_directories(unfinished);
  // A pipe is a disk as slow as its reader.
  const std::string pipe = unfinished + dist::shard_name(0, 1) + ".tmp";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_GE(::fcntl(reader, F_SETPIPE_SZ, 4096), 4096);
  writer->start(2);
  for (int waiting = 0; waiting < 4096;) ASSERT_EQ(::ioctl(reader, FIONREAD, &waiting), 0);
  std::thread ending([&] { writer.reset(); });
  std::vector<char> buffer(4096);
  int64_t bytes = 0;
  while (fs::exists(pipe)) {
    const ssize_t n = ::read(reader, buffer.data(), buffer.size());
    bytes += std::max<ssize_t>(n, 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  ending.join();
  ::close(reader);

  int64_t all = 0;
  for (float unused : state_of(job)) all += sizeof unused;
  ASSERT_GT(all, 20 * 4096) << "nothing to break off";
  EXPECT_LT(bytes, all / 2);
  EXPECT_FALSE(fs::exists(saved(2)));
}

void flip_bit(const std::string& path, uintmax_t at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const char changed = static_cast<char>(file.get() ^ 4);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(changed);
}

TEST_F(Checkpoints, DamagedFilesAreRefusedByNameAndTheOneBeforeIsOffered) {
  {
    TinyJob job(config(), world());
    save(job, 3);
    save(job);
  }
  all_->barrier();
  if (all_->rank() != 0) return;
  const std::string good = folder_.path() + "/good";
  fs::copy(saved(), good);
  ASSERT_NO_THROW(dist::verify_checkpoint(saved(), 0, 1));
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(good))
    names.push_back(entry.path().filename().string());
  ASSERT_GE(names.size(), 3u);
  int64_t tried = 0;
  auto expect_refusal = [&](const std::string& name, const std::string& how) {
    ++tried;
    std::string message;
    try {
      dist::verify_checkpoint(saved(), 0, 1);
      ADD_FAILURE() << name << " " << how << " was taken up";
    } catch (const InputError& error) {
      message = error.what();
    }
    // A damaged list of checksums looks like damage to the file that it speaks of.
    if (name != "SHA256SUMS") {
      EXPECT_EQ(message.find(saved() + "/" + name), 0u) << how << ": " << message;
    }
    EXPECT_NE(message.find("--resume " + saved(3)), std::string::npos) << how << ": " << message;
    fs::copy(good + "/" + name, saved() + "/" + name, fs::copy_options::overwrite_existing);
  };
  for (const std::string& name : names) {
    const std::string path = saved() + "/" + name;
    const uintmax_t size = fs::file_size(path);
    for (const uintmax_t at : {uintmax_t{0}, uintmax_t{9}, size / 3, size / 2, size - 1}) {
      flip_bit(path, at);
      expect_refusal(name, fmt::format("with a flipped bit in byte {}", at));
    }
    for (const uintmax_t kept : {uintmax_t{0}, size / 2, size - 1}) {
      fs::resize_file(path, kept);
      expect_refusal(name, fmt::format("cut to {} bytes", kept));
    }
    fs::remove(path);
    expect_refusal(name, "removed");
  }
  EXPECT_GE(tried, 27);
  EXPECT_NO_THROW(dist::verify_checkpoint(saved(), 0, 1)) << "as it was written";
}

// On disk, without ranks: each rank in a folder of its own.

void pretend_checkpoint(const std::string& folder, int64_t step) {
  dist::Manifest manifest;
  manifest.step = step;
  manifest.ranks = manifest.shards = 1;
  const std::string unfinished = folder + "/" + dist::checkpoint_name(step) + ".tmp";
  fs::create_directories(unfinished);
  std::ofstream(unfinished + "/" + dist::shard_name(0, 1)) << "shard";
  dist::seal_checkpoint(folder, manifest, {{std::string(64, '0'), 5}});
}

TEST(CheckpointFolder, AShardOfAnotherSizeThanWasWrittenIsNoCheckpoint) {
  const test::TempFolder temp;
  dist::Manifest manifest;
  manifest.step = 5;
  manifest.ranks = manifest.shards = 1;
  fs::create_directories(temp / "step-000005.tmp");
  test::write_text(temp / "step-000005.tmp/shard-00000-of-00001.safetensors", "shar");

  test::expect_refused<RunError>(
      [&] {
        dist::seal_checkpoint(temp.path(), manifest, {{std::string(64, '0'), 5}});
      },
      {"shard-00000-of-00001.safetensors", "wrote 5 bytes, rank 0 sees 4"});
  EXPECT_TRUE(dist::list_checkpoints(temp.path()).empty());
}

TEST(CheckpointFolder, TheNewestAndTheMultiplesAreKept) {
  const test::TempFolder temp;
  for (int64_t step = 5; step <= 30; step += 5) {
    pretend_checkpoint(temp.path(), step);
    dist::prune_checkpoints(temp.path(), step - 5, step, {5, 2, 10});
  }

  EXPECT_EQ(dist::list_checkpoints(temp.path()), (std::vector<int64_t>{10, 20, 25, 30}));
}

TEST(CheckpointFolder, ARunThatWentBackReplacesWhatItLeftBehind) {
  const test::TempFolder temp;
  for (int64_t step : {5, 10, 15}) pretend_checkpoint(temp.path(), step);
  std::ofstream(temp.path() + "/step-000010/mine") << "of before";
  pretend_checkpoint(temp.path(), 10);
  dist::prune_checkpoints(temp.path(), 5, 10, {5, 2, 0});

  EXPECT_EQ(dist::list_checkpoints(temp.path()), (std::vector<int64_t>{5, 10}));
  EXPECT_FALSE(fs::exists(temp.path() + "/step-000010/mine"));
}

TEST(CheckpointFolder, WhatLiesBetweenTheResumedAndTheFirstNewOneGoes) {
  const test::TempFolder temp;
  for (int64_t step : {5, 10, 15, 20}) pretend_checkpoint(temp.path(), step);
  pretend_checkpoint(temp.path(), 17);  // of a run that went on from 5 at another interval
  dist::prune_checkpoints(temp.path(), 5, 17, {12, 2, 10});

  EXPECT_EQ(dist::list_checkpoints(temp.path()), (std::vector<int64_t>{5, 17}));
}

TEST(CheckpointFolder, GoingBackIsRememberedBeforeTheFirstNewOne) {
  const test::TempFolder temp;
  std::vector<std::string> warnings;
  for (int64_t step : {5, 10}) pretend_checkpoint(temp.path(), step);
  dist::name_latest(temp.path(), 5);

  EXPECT_EQ(dist::find_latest(temp.path(), warnings), temp.path() + "/step-000005");
  EXPECT_TRUE(warnings.empty());
}

TEST(CheckpointFolder, AutoMeansLatestAndSaysWhereThatIsWrong) {
  const test::TempFolder temp;
  std::vector<std::string> warnings;
  EXPECT_FALSE(dist::find_latest(temp.path() + "/none", warnings));
  EXPECT_FALSE(dist::find_latest(temp.path(), warnings));
  for (int64_t step : {5, 10}) pretend_checkpoint(temp.path(), step);
  fs::create_directories(temp.path() + "/step-000020.tmp");
  EXPECT_EQ(dist::find_latest(temp.path(), warnings), temp.path() + "/step-000010");
  write_file_atomically(temp.path() + "/latest", "step-000005\n");
  EXPECT_EQ(dist::find_latest(temp.path(), warnings), temp.path() + "/step-000005");
  EXPECT_TRUE(warnings.empty());

  for (const char* wrong : {"step-000015\n", "../step-000005", "", "step-5"}) {
    write_file_atomically(temp.path() + "/latest", wrong);
    EXPECT_EQ(dist::find_latest(temp.path(), warnings), temp.path() + "/step-000010") << wrong;
  }
  fs::remove(temp.path() + "/latest");
  EXPECT_EQ(dist::find_latest(temp.path(), warnings), temp.path() + "/step-000010");
  ASSERT_EQ(warnings.size(), 5u);
  EXPECT_NE(warnings[0].find("names \"step-000015\", which is not there"), std::string::npos);
  EXPECT_NE(warnings[4].find("latest is missing"), std::string::npos);
}

TEST(CheckpointFolder, ChecksumsOfFilesElsewhereAreRefused) {
  const test::TempFolder temp;
  pretend_checkpoint(temp.path(), 5);
  const std::string folder = temp.path() + "/step-000005", sums = folder + "/SHA256SUMS";
  const std::string text = read_small_file(sums, 1 << 20);
  for (const std::string name : {"../outside.safetensors", "/etc/passwd", "a/b"}) {
    write_file_atomically(sums, text + std::string(64, '0') + "  " + name + "\n");
    test::expect_refused<InputError>([&] { dist::verify_checkpoint(folder, 0, 1); },
                                     {sums, name, "another folder"});
  }
}

TEST(CheckpointFolder, OnlyWhatWasBegunIsRemoved) {
  const test::TempFolder temp;
  for (const char* name : {"step-000020.tmp", "step-000010.old", "mine.tmp", "step-mine.old"})
    fs::create_directories(temp.path() + "/" + name);
  pretend_checkpoint(temp.path(), 5);
  std::ofstream(temp.path() + "/latest.tmp") << "st";
  dist::remove_unfinished(temp.path());

  std::set<std::string> left;
  for (const auto& entry : fs::directory_iterator(temp.path()))
    left.insert(entry.path().filename().string());
  EXPECT_EQ(left, (std::set<std::string>{"latest", "mine.tmp", "step-000005", "step-mine.old"}));
}

TEST(CheckpointManifest, ReadsBackWhatWasWritten) {
  dist::Manifest m{12, 11, 8, 4, {{"train.seed", "1"}}, {{"data", "ab"}}, {{"safegrad", "0"}}, {}};
  const dist::Manifest read = dist::parse_manifest(dist::to_json(m), "here");
  m.align = {345, -0x1.23456789abcdep-3};
  const dist::Manifest with_align = dist::parse_manifest(dist::to_json(m), "here");

  EXPECT_EQ(read.updates, 11);
  EXPECT_FALSE(read.align);
  ASSERT_TRUE(with_align.align);
  EXPECT_EQ(with_align.align->loss, m.align->loss) << "to the bit";
  EXPECT_EQ(with_align.align->tokens, 345);
  EXPECT_EQ(dist::to_json(with_align), dist::to_json(m));
}

TEST(CheckpointManifest, WhatCannotBeIsRefused) {
  const std::string good = dist::to_json({12, 11, 8, 4, {}, {}, {}, {}});
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"checkpoint/1", "checkpoint/2"},
           {"\"updates\": 11", "\"updates\": 13"},
           {"\"shards\": 4", "\"shards\": 9"},
           {"\"shards\": 4", "\"shards\": 100000000000"},
           {"\"step\": 12", "\"step\": -1"},
           {"\"inputs\": {}", "\"inputs\": [1]"},
           {"\"config\": {}", "\"config\": {\"a\": 1}"},
           {"\"step\": 12", "\"step\": 12, \"step\": 12"},
           {"{", ""}}) {
    std::string bad = good;
    ASSERT_NE(bad.find(from), std::string::npos) << from;
    bad.replace(bad.find(from), from.size(), to);
    EXPECT_THROW(dist::parse_manifest(bad, "here"), InputError) << to;
  }
}

TEST(CheckpointManifest, OnlyChangesThatCountAreDifferences) {
  RunConfig config;
  config.data.task = "a/task";
  dist::Manifest saved, now;
  saved.config = config_values(config);
  saved.inputs = {{"data.task content", "aa"}, {"model weights", "bb"}};
  config.data.task = "moved/task";
  config.parallel.shards = 2;
  config.batch.max_tokens_per_rank = 99;
  config.checkpoint.keep_last = 9;
  config.output = "elsewhere";
  config.probe.push_back({"p", "file", 1});
  now.config = config_values(config);
  now.inputs = {{"data.task content", "aa"}};
  EXPECT_EQ(dist::differences(saved, now), std::vector<std::string>{});

  config.objective.rho = 2;
  config.batch.task_sequences = 3;
  config.train.steps = 7;
  now.config = config_values(config);
  now.inputs["data.task content"] = "ac";
  EXPECT_EQ(
      dist::differences(saved, now),
      (std::vector<std::string>{
          "batch.task_sequences: was 8, is 3", "objective.rho: was 1.0, is 2.0",
          "train.steps: was not given, is 7", "data.task content: its fingerprint was aa, is ac"}));
}

TEST(CheckpointManifest, AKeyThatAnOlderProgramDidNotKnowHadItsDefault) {
  RunConfig config;
  dist::Manifest saved, now;
  saved.config = now.config = config_values(config);
  ASSERT_EQ(saved.config.erase("objective.align_every"), 1u);
  EXPECT_EQ(dist::differences(saved, now), std::vector<std::string>{});
  config.objective.align_every = 4;
  now.config = config_values(config);
  EXPECT_EQ(dist::differences(saved, now),
            std::vector<std::string>{"objective.align_every: was 1, is 4"});
}

}  // namespace
}  // namespace safegrad::testing
