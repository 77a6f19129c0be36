// training_gpu_test.cpp: the same training on GPUs as on the CPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "cpu/cpu_backend.h"
#include "dist/rank_main.h"
#include "dist/solo_communicator.h"
#include "dist/tiny_job.h"

namespace safegrad::testing {
namespace {

constexpr int64_t kSteps = 10;

class GpuTraining : public ::testing::TestWithParam<std::string> {
 protected:
  GpuTraining() : all_(world()), folder_(*all_) {}
  void TearDown() override { all_->barrier(); }

  RunConfig config() {
    RunConfig c = tiny_config(GetParam(), folder_.path());
    if (all_->rank() == 0) write_tiny_data(c);
    all_->barrier();
    return c;
  }
  // Each rank by itself, on its cores.
  std::vector<StepRecord> on_cpu(RunConfig c) {
    c.parallel.shards = 1;
    c.output += "-cpu-" + std::to_string(all_->rank());
    return TinyJob(c, std::make_unique<dist::SoloCommunicator>(), cpu_backend()).run(0, kSteps);
  }
  std::vector<StepRecord> on_gpu(const RunConfig& c) { return TinyJob(c, world()).run(0, kSteps); }

  std::unique_ptr<dist::Communicator> all_;
  SharedFolder folder_;
};

void expect_near(const std::vector<StepRecord>& a, const std::vector<StepRecord>& b,
                 double relative) {
  ASSERT_EQ(a.size(), b.size());
  ASSERT_LT(b.back().loss_task, b.front().loss_task) << "nothing was learned";
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_FALSE(a[i].skipped);
    EXPECT_NEAR(a[i].loss_task / b[i].loss_task, 1, relative) << "step " << i;
    EXPECT_NEAR(a[i].uu / b[i].uu, 1, 10 * relative) << "step " << i;
    EXPECT_NEAR(*a[i].loss_align, *b[i].loss_align, relative) << "step " << i;
  }
}

TEST_P(GpuTraining, Float32FollowsTheCpu) {
  const RunConfig c = config();
  expect_near(on_gpu(c), on_cpu(c), 1e-4);
}

TEST_P(GpuTraining, Float32WithAdaptersDropoutAndRecomputationFollowsTheCpu) {
  RunConfig c = config();
  c.model.lora = LoraConfig{.dropout = 0.1};
  c.parallel.recompute = Recompute::block;
  c.batch.max_tokens_per_rank = 64;
  expect_near(on_gpu(c), on_cpu(c), 1e-4);
}

TEST_P(GpuTraining, Bfloat16FollowsFloat32) {
  const RunConfig c = config();
  RunConfig narrow = c;
  narrow.model.dtype = ComputeDtype::bfloat16;
  // 8 bits of fraction: a per mille or so a loss, compounded over the steps.
  expect_near(on_gpu(narrow), on_cpu(c), 0.05);
}

TEST_P(GpuTraining, TheSameRunTwiceGivesTheSameBits) {
  RunConfig c = config();
  for (ComputeDtype dtype : {ComputeDtype::float32, ComputeDtype::bfloat16}) {
    c.model.dtype = dtype;
    TinyJob first(c, world()), second(c, world());
    const auto a = first.run(0, kSteps), b = second.run(0, kSteps);
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].loss_task, b[i].loss_task) << "step " << i;
      EXPECT_EQ(a[i].ua, b[i].ua) << "step " << i;
    }
    EXPECT_EQ(first.weights(), second.weights());
  }
}

TEST_P(GpuTraining, MemoryIsFlatAfterTheFirstSteps) {
  RunConfig c = config();
  c.batch.task_sequences = 11;  // every step draws every sequence: the same tokens each time
  c.batch.align_sequences = 7;
  TinyJob job(c, world());
  job.run(0, 2);
  backend().take_peak_bytes();  // of earlier tests, and of the first steps
  job.run(2, 4);
  const int64_t peak = backend().take_peak_bytes();
  ASSERT_GT(peak, 0);
  job.run(4, kSteps);
  EXPECT_EQ(backend().take_peak_bytes(), peak);
}

INSTANTIATE_TEST_SUITE_P(Models, GpuTraining, ::testing::Values("llama3", "qwen2"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace safegrad::testing
