#include "core/schedule.h"

#include <gtest/gtest.h>

namespace safegrad {
namespace {

const ScheduleKind kKinds[] = {ScheduleKind::constant, ScheduleKind::linear, ScheduleKind::cosine};

ScheduleSection schedule(ScheduleKind kind, int64_t warmup) {
  ScheduleSection section;
  section.kind = kind;
  section.warmup_steps = warmup;
  return section;
}

// Each factor is a few fp64 operations.
constexpr double kRounding = 1e-14;

TEST(Schedule, ConstantIsOneAtEveryStep) {
  for (int64_t step : {0, 1, 99, 1000}) {
    EXPECT_EQ(schedule_factor(schedule(ScheduleKind::constant, 0), step, 100), 1);
  }
}

TEST(Schedule, WarmupRisesInEqualStepsToTheFullRate) {
  for (ScheduleKind kind : kKinds) {
    for (int64_t step = 0; step <= 4; ++step) {
      EXPECT_NEAR(schedule_factor(schedule(kind, 4), step, 20), 0.2 * static_cast<double>(step + 1),
                  kRounding);
    }
  }
}

TEST(Schedule, LinearFallsInEqualStepsAndWouldReachZeroOneStepAfterTheLast) {
  const auto linear = schedule(ScheduleKind::linear, 5);
  for (int64_t step = 5; step < 15; ++step) {
    EXPECT_NEAR(schedule_factor(linear, step, 15), 1 - 0.1 * static_cast<double>(step - 5),
                kRounding);
  }
  EXPECT_EQ(schedule_factor(linear, 15, 15), 0);
}

TEST(Schedule, CosineIsTheHalfPeriod) {
  const auto cosine = schedule(ScheduleKind::cosine, 2);
  EXPECT_NEAR(schedule_factor(cosine, 2, 14), 1, kRounding);
  EXPECT_NEAR(schedule_factor(cosine, 6, 14), 0.75, kRounding);  // a third: (1 + cos 60°) / 2
  EXPECT_NEAR(schedule_factor(cosine, 8, 14), 0.5, kRounding);
  EXPECT_NEAR(schedule_factor(cosine, 10, 14), 0.25, kRounding);
  EXPECT_NEAR(schedule_factor(cosine, 14, 14), 0, kRounding);
}

TEST(Schedule, EveryStepMovesAndNoFactorExceedsOne) {
  for (ScheduleKind kind : kKinds) {
    for (int64_t total : {1, 2, 7, 300}) {
      for (int64_t warmup : {int64_t{0}, int64_t{1}, total - 1, total, total + 5}) {
        double previous = 0;
        for (int64_t step = 0; step < total; ++step) {
          const double factor = schedule_factor(schedule(kind, warmup), step, total);
          EXPECT_GT(factor, 0) << step << " of " << total << ", warm-up " << warmup;
          EXPECT_LE(factor, 1);
          if (step <= warmup) {
            EXPECT_GT(factor, previous);
          } else {
            EXPECT_LE(factor, previous);
          }
          previous = factor;
        }
      }
    }
  }
}

}  // namespace
}  // namespace safegrad
