// gate_test.cpp: which samples a gate leaves out, from scores that are given.
#include "dist/gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

namespace safegrad::dist {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Scores 0, 1, …, n − 1 in another order: median (n − 1) / 2, median absolute deviation n / 4.
Gate gate_of(double deviations, int64_t n) {
  Gate gate(deviations, std::vector<int64_t>(static_cast<size_t>(n), 1));
  std::vector<double> scores(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    scores[static_cast<size_t>(i)] = static_cast<double>((i * 7 + 3) % n);  // 7 and n share nothing
  gate.set_scores(scores);
  return gate;
}

TEST(Gate, TheThresholdLiesRobustDeviationsBelowTheMedian) {
  constexpr double kRounding = 1e-13;  // of products of numbers below 30
  EXPECT_NEAR(gate_of(1.5, 40).threshold(), 19.5 - 1.5 * 1.4826 * 10, kRounding);
  EXPECT_NEAR(gate_of(1.5, 41).threshold(), 20 - 1.5 * 1.4826 * 10, kRounding);
  // One far outlier moves neither.
  Gate gate = gate_of(1.5, 41);
  std::vector<double> scores = gate.scores();
  *std::min_element(scores.begin(), scores.end()) = -1e9;
  gate.set_scores(scores);
  EXPECT_NEAR(gate.threshold(), 20 - 1.5 * 1.4826 * 10, kRounding);
}

TEST(Gate, SamplesBelowItAreLeftOutWhenTheyAreDrawn) {
  const Gate gate = gate_of(1.0, 40);  // 19.5 − 14.826 = 4.674
  std::vector<int64_t> drawn, expected;
  for (int64_t i = 39; i >= 0; i -= 2) drawn.push_back(i);
  for (int64_t i = 1; i < 40; i += 2) {
    if (gate.scores()[static_cast<size_t>(i)] < 5) expected.push_back(i);
  }
  ASSERT_GT(expected.size(), 1u);
  ASSERT_LT(expected.size(), 5u) << "others are below it, too, and not drawn";
  EXPECT_EQ(gate.leave_out(drawn), expected);
}

TEST(Gate, AScoreAtTheThresholdIsNoOutlier) {
  Gate gate = gate_of(1.0, 40);
  std::vector<double> scores = gate.scores();
  const size_t lowest =
      static_cast<size_t>(std::min_element(scores.begin(), scores.end()) - scores.begin());
  scores[lowest] = gate.threshold();
  gate.set_scores(scores);
  ASSERT_EQ(scores[lowest], gate.threshold());
  // Beside one that stays anyway, so that this one need not.
  const int64_t other = std::max_element(scores.begin(), scores.end()) - scores.begin();
  EXPECT_TRUE(gate.leave_out({static_cast<int64_t>(lowest), other}).empty());
}

TEST(Gate, TooFewScoresHaveNoOutliers) {
  Gate gate = gate_of(1.0, 40);
  std::vector<double> scores = gate.scores();
  int64_t known = std::ssize(scores);
  std::vector<int64_t> all;
  for (int64_t i = 0; i < 40; ++i) all.push_back(i);
  for (size_t i = 0; known > Gate::kFewest - 1; ++i) {
    ASSERT_FALSE(gate.leave_out(all).empty()) << known;
    if (scores[i] < 4) continue;
    scores[i] = kNan;
    --known;
    gate.set_scores(scores);
  }
  EXPECT_TRUE(gate.leave_out(all).empty());
  EXPECT_EQ(gate.threshold(), -std::numeric_limits<double>::infinity());
}

TEST(Gate, ASampleWithoutAScoreRuns) {
  Gate gate = gate_of(1.0, 48);
  std::vector<double> scores = gate.scores();
  scores[5] = kNan;
  gate.set_scores(scores);
  EXPECT_TRUE(gate.leave_out({5}).empty());
}

TEST(Gate, WhereMostScoresAreTheSameNoneIsAnOutlier) {
  Gate gate = gate_of(1.0, 40);
  std::vector<double> scores(40, 2.0);
  scores[3] = -100;
  gate.set_scores(scores);
  EXPECT_TRUE(gate.leave_out({1, 3}).empty());
}

TEST(Gate, OfDrawsThatAreAllOutliersTheBestOneStays) {
  const Gate gate = gate_of(1.0, 40);
  std::vector<int64_t> outliers;
  for (int64_t i = 0; i < 40; ++i) {
    if (gate.scores()[static_cast<size_t>(i)] < 4) outliers.push_back(i);
  }
  ASSERT_EQ(outliers.size(), 4u);
  const std::vector<int64_t> out = gate.leave_out(outliers);
  ASSERT_EQ(out.size(), 3u);
  for (int64_t i : out) EXPECT_LT(gate.scores()[static_cast<size_t>(i)], 3);
}

// Two micro-batches on three ranks, of which one has nothing; slots are as many as the fullest has.
TEST(Gate, TakesEveryRanksScoresAsMeansPerResponseToken) {
  Gate gate(1.0, {1, 2, 4, 5, 8});
  const StepPlan plan{{{{{0, 3}, {1, 0}}, {}, {{0, 0}}}, {{{0, 1}}, {}, {}}}};
  EXPECT_EQ(score_slots(plan), 2);
  gate.take(plan, {10, -6, 99, 99, 7, 99});
  const std::vector<double>& scores = gate.scores();
  EXPECT_EQ(scores[3], 2);
  EXPECT_EQ(scores[1], -3);
  EXPECT_EQ(scores[0], 7);
  EXPECT_TRUE(std::isnan(scores[2]) && std::isnan(scores[4]));
  gate.take(plan, {-10, HUGE_VAL, 99, 99, kNan, 99});
  EXPECT_EQ(scores[3], -2) << "the last score counts";
  EXPECT_EQ(scores[1], -3) << "what is not finite is no score";
  EXPECT_EQ(scores[0], 7);
  gate.take(plan, {});
  EXPECT_EQ(scores[3], -2) << "a step without a direction leaves all";
}

}  // namespace
}  // namespace safegrad::dist
