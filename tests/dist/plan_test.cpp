// plan_test.cpp: real ranks send and hold what the plan of their number says.
#include "plan.h"

#include <gtest/gtest.h>

#include "cpu/allocation_count.h"
#include "dist/rank_main.h"
#include "dist/separate_machines.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

class PlannedRanks : public ::testing::Test {
 protected:
  PlannedRanks() : all_(world()), folder_(*all_), config_(tiny_config("qwen2", folder_.path())) {
    if (all_->rank() == 0) write_tiny_data(config_);
    all_->barrier();
  }
  void TearDown() override { all_->barrier(); }

  void expect_ranks_as_planned() {
    for (int64_t shards = 1; shards <= all_->size(); ++shards) {
      if (all_->size() % shards != 0) continue;
      SCOPED_TRACE("shards " + std::to_string(shards));
      config_.parallel.shards = shards;
      expect_as_planned();
    }
  }

  dist::RankPlan plan_of(TinyJob& job, bool separate) {
    std::vector<std::string> warnings;
    const auto data = dist::open_data(config_, *job.model.decoder, "", warnings);
    dist::PlanInput input = plan_input(config_, data, /*gpu=*/false, /*near=*/1);
    input.hardware = known_hardware();
    input.device = input.hardware.device("h100");
    input.device.ranks_per_node = all_->size();
    input.separate_machines = separate;
    return dist::plan_rank(*job.model.decoder, input, all_->size());
  }

  void expect_as_planned() {
    AllocationCount count;
    TinyJob job(config_, std::make_unique<SeparateMachines>(world()));
    const dist::RankPlan plan = plan_of(job, /*separate=*/true);
    job.run(plan.step, plan.step + 1);
    const auto before = sent(job);
    count.take_peak();
    const StepRecord record = job.run(plan.step, plan.step + 1).front();
    const int64_t peak = count.take_peak();
    EXPECT_NEAR(plan.flops / record.flops, 1.0, 1e-12);

    for (const auto& [name, after] : sent(job)) {
      const auto found = before.find(name);
      const dist::Traffic old = found == before.end() ? dist::Traffic{} : found->second;
      const auto planned = plan.traffic.find(name);
      ASSERT_NE(planned, plan.traffic.end()) << name;
      EXPECT_EQ(after.calls - old.calls, planned->second.calls) << name;
      EXPECT_EQ(after.bytes - old.bytes, planned->second.bytes) << name;
    }
    // The model is so small that scratch of MPI and of a step's plan counts: 5 % is the promise.
    if (all_->rank() == plan.rank) {
      EXPECT_NEAR(static_cast<double>(plan.memory.peak()) / static_cast<double>(peak), 1.0, 0.05)
          << plan.memory.moment;
    }
  }

  static std::map<std::string, dist::Traffic> sent(TinyJob& job) {
    auto traffic = counters(job.mesh.shard_group());
    traffic.erase("scalars");
    traffic.merge(counters(job.mesh.replica_group()));
    traffic["scalars"] = counters(job.mesh.world()).at("scalars");
    return traffic;
  }
  static std::map<std::string, dist::Traffic> counters(dist::Communicator& group) {
    return dynamic_cast<SeparateMachines&>(group).inner_traffic();
  }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
  RunConfig config_;
};

TEST_F(PlannedRanks, FullFineTuning) {
  expect_ranks_as_planned();
}

TEST_F(PlannedRanks, Adapters) {
  config_.model.trainable.clear();
  config_.model.lora = LoraConfig{.rank = 4, .dropout = 0.2, .targets = {"q_proj", "down_proj"}};
  expect_ranks_as_planned();
}

// The alignment responses give the second of two steps a direction; the KL has none there.
TEST_F(PlannedRanks, SamplesAreScored) {
  config_.objective.gate = 2;
  config_.objective.align_loss = AlignLoss::sft;
  config_.batch.max_tokens_per_rank = 67;
  expect_ranks_as_planned();
  config_.model.trainable.clear();
  config_.model.lora = LoraConfig{.rank = 4, .alpha = 8, .targets = {"q_proj", "down_proj"}};
  expect_ranks_as_planned();
}

TEST_F(PlannedRanks, Bfloat16InSeveralMicroBatches) {
  config_.model.dtype = ComputeDtype::bfloat16;
  config_.batch.max_tokens_per_rank = 41;
  expect_ranks_as_planned();
}

// Shards and the inputs of reductions lie in mappings that LibTorch does not allocate; the plan has
// this rank's part of them as weights and buffers.
TEST_F(PlannedRanks, RanksOfOneMachineShareTheirMemory) {
  if (!all_->allocate_shards(16, at::kFloat).all.defined())
    GTEST_SKIP() << "these ranks cannot map each other's memory";
  AllocationCount count;
  TinyJob job(config_, world());
  const dist::RankPlan plan = plan_of(job, /*separate=*/false);
  job.run(plan.step, plan.step + 1);
  count.take_peak();
  job.run(plan.step, plan.step + 1);
  const int64_t peak = count.take_peak();

  EXPECT_EQ(plan.transport, dist::Transport::shared_memory);
  const dist::Memory& m = plan.memory.at_peak;
  const int64_t own = m.total() - m.weights - m.buffers;
  // What a step holds besides its tensors: scalars of the exchange.
  if (all_->rank() == plan.rank) {
    EXPECT_NEAR(static_cast<double>(own) / static_cast<double>(peak), 1.0, 0.01);
  }
}

}  // namespace
}  // namespace safegrad::testing
