#include "core/loss_spike.h"

#include <cmath>

#include <gtest/gtest.h>

namespace safegrad {
namespace {

/// A rule that has seen `count` losses around 2, alternately 1.9 and 2.1: median 2, deviation 0.1.
LossSpikeRule after(size_t count) {
  LossSpikeRule rule;
  for (size_t i = 0; i < count; ++i)
    EXPECT_FALSE(rule.add(i % 2 == 0 ? 1.9 : 2.1)) << "ordinary loss " << i;
  return rule;
}

constexpr double kLimit = 2 + 6 * 1.4826 * 0.1;  // above 2 + 0.2 * 2

TEST(LossSpike, ALossAboveTheLimitIsOneAndBelowItIsNone) {
  EXPECT_FALSE(after(30).add(kLimit - 1e-6));
  const auto spike = after(30).add(kLimit + 1e-6);

  ASSERT_TRUE(spike);
  EXPECT_DOUBLE_EQ(spike->median, 2);
  EXPECT_NEAR(spike->limit, kLimit, 1e-12) << "2.1 - 2 is not 0.1 to the last bit";
  EXPECT_FALSE(after(30).add(0.01)) << "a small loss is no spike";
}

TEST(LossSpike, NothingIsOneBeforeTheWarmUp) {
  EXPECT_FALSE(after(LossSpikeRule::kWarmup - 1).add(1e6));
  EXPECT_TRUE(after(LossSpikeRule::kWarmup).add(1e6));
}

TEST(LossSpike, LossesThatHardlyVaryNeedAFifthMore) {
  LossSpikeRule rule;
  for (int i = 0; i < 30; ++i) rule.add(0.5);
  EXPECT_FALSE(rule.add(0.59));
  EXPECT_TRUE(rule.add(0.61));
}

TEST(LossSpike, OneSpikeDoesNotHideTheNext) {
  LossSpikeRule rule = after(30);
  EXPECT_TRUE(rule.add(50));
  EXPECT_TRUE(rule.add(4)) << "mean + 6 deviations of the window is 50 now, the limit 3.88";
}

TEST(LossSpike, ANewLevelIsOrdinaryOnceItFillsTheWindow) {
  LossSpikeRule rule = after(LossSpikeRule::kWindow);
  size_t spikes = 0;
  for (size_t i = 0; i < LossSpikeRule::kWindow; ++i) spikes += rule.add(4).has_value();
  EXPECT_GE(spikes, 1u);
  EXPECT_LE(spikes, LossSpikeRule::kWindow / 2 + 1);
  EXPECT_FALSE(rule.add(4));
  EXPECT_TRUE(rule.add(5)) << "and what stands out from it is a spike again";
}

TEST(LossSpike, AFallingLossIsNone) {
  LossSpikeRule rule;
  for (int i = 0; i < 300; ++i) EXPECT_FALSE(rule.add(3 * std::exp(-i / 40.0))) << i;
}

}  // namespace
}  // namespace safegrad
