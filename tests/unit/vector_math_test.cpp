#include "core/vector_math.h"

#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace safegrad {
namespace {

// |exp_f32(x) - eˣ| in units of the spacing of floats at eˣ.
double error_ulp(float x) {
  const double exact = std::exp(static_cast<double>(x));
  const auto nearest = static_cast<float>(exact);
  const double spacing = std::nextafter(nearest, std::numeric_limits<float>::infinity()) - nearest;
  return std::abs(static_cast<double>(exp_f32(x)) - exact) / spacing;
}

// Half an ulp of the last rounding, plus the polynomial's roundings and truncation (see exp_f32).
constexpr double kUlp = 1.5;

TEST(ExpF32, IsAccurateOverItsWholeRange) {
  double worst = 0;
  // Every 257th float of each sign, from 0 over denormals up to the ends of the range.
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(88.0f); bits += 257) {
    worst = std::max(worst, error_ulp(std::bit_cast<float>(bits)));
  }
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(87.3f); bits += 257) {
    worst = std::max(worst, error_ulp(-std::bit_cast<float>(bits)));
  }
  EXPECT_LE(worst, kUlp);
}

TEST(ExpF32, IsAccurateWhereThePowerOfTwoChanges) {
  double worst = 0;
  for (int n = -125; n <= 126; ++n) {
    auto x = static_cast<float>((n + 0.5) * std::log(2.0));
    for (int i = 0; i < 8; ++i) x = std::nextafter(x, -100.0f);
    for (int i = 0; i < 16; ++i, x = std::nextafter(x, 100.0f)) {
      worst = std::max(worst, error_ulp(x));
    }
  }
  EXPECT_LE(worst, kUlp);
}

TEST(ExpF32, HasExactOneAndStaysPositiveAndTinyBelowItsRange) {
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-0.0f), 1.0f);
  for (float x : {-87.4f, -1e3f, -1e30f, -std::numeric_limits<float>::infinity()}) {
    EXPECT_GE(exp_f32(x), 0.0f);
    EXPECT_LE(exp_f32(x), 2e-38f);
  }
}

TEST(ExpF32, PassesNaNOnSoThatTheStepIsSkipped) {
  EXPECT_TRUE(std::isnan(exp_f32(std::numeric_limits<float>::quiet_NaN())));
}

TEST(SigmoidF32, IsAccurateEverywhereAndSaturatesWithoutNaN) {
  for (double x = -80; x <= 80; x += 0.0137) {
    const auto input = static_cast<float>(x);
    const double exact = 1 / (1 + std::exp(-static_cast<double>(input)));
    // Relative: 1.5 ulp of the exponential, a sum and a quotient.
    EXPECT_NEAR(sigmoid_f32(input), exact, 3.5e-7 * exact) << x;
  }
  EXPECT_EQ(sigmoid_f32(0.0f), 0.5f);
  for (float x : {100.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(sigmoid_f32(x), 1.0f);
    EXPECT_GE(sigmoid_f32(-x), 0.0f);
    EXPECT_LE(sigmoid_f32(-x), 2e-38f);
  }
}

struct KnownAnswer {
  uint64_t key, low, high;
  RandomBits bits;
};

// Known-answer vectors published with Random123 (philox4x32, 10 rounds): zeros, ones, digits of π.
TEST(Philox, GivesThePublishedAnswers) {
  const KnownAnswer answers[] = {
      {0, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {~0ull, ~0ull, ~0ull, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {0x299f31d0a4093822,
       0x85a308d3243f6a88,
       0x0370734413198a2e,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const KnownAnswer& answer : answers) {
    EXPECT_EQ(Philox(answer.key)(answer.low, answer.high), answer.bits);
  }
}

TEST(Uniform01, CoversTheUnitIntervalWithoutItsEnd) {
  EXPECT_EQ(uniform01(0), 0.0f);
  EXPECT_EQ(uniform01(0x80000000u), 0.5f);
  EXPECT_EQ(uniform01(0xFFFFFFFFu), 1.0f - 0x1.0p-24f);
}

TEST(Mix64, KeysOfTwoWordsDifferInEitherWordAndInTheirOrder) {
  std::set<uint64_t> seen;
  size_t made = 0;
  for (uint64_t a = 0; a < 64; ++a) {
    for (uint64_t b = 0; b < 64; ++b, ++made) seen.insert(mix64(mix64(43, a), b));
  }
  EXPECT_EQ(seen.size(), made);  // 4096 of 2⁶⁴: a repetition would be a defect, not chance
}

}  // namespace
}  // namespace safegrad
