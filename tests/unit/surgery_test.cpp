#include "core/surgery.h"

#include <cmath>
#include <limits>
#include <random>

#include <gtest/gtest.h>

#include "core/error.h"

namespace safegrad {
namespace {

using Vector = std::vector<double>;

// Vectors have at most 64 elements of size 1, so a dot product is right to 64 · 1.1e-16 · |u||a|,
// and a coefficient times a vector to about 1e-14 |u|.
constexpr double kRounding = 1e-13;

double dot(const Vector& x, const Vector& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

double norm(const Vector& x) {
  return std::sqrt(dot(x, x));
}

Vector mix(double a, const Vector& x, double b, const Vector& y) {
  Vector result(x.size());
  for (size_t i = 0; i < x.size(); ++i) result[i] = a * x[i] + b * y[i];
  return result;
}

// x without its component along `direction`.
Vector without(const Vector& x, const Vector& direction) {
  return mix(1, x, -dot(x, direction) / dot(direction, direction), direction);
}

struct Gradients {
  Vector u, a;

  Gram gram() const {
    Gram result(2);
    result.at(0, 0) = dot(u, u);
    result.at(0, 1) = result.at(1, 0) = dot(u, a);
    result.at(1, 1) = dot(a, a);
    return result;
  }
  Vector combined(const RuleOptions& options) const {
    const auto c = combine(gram(), options);
    EXPECT_EQ(c.size(), 2u);
    return mix(c[0], u, c[1], a);
  }
  bool conflict() const { return dot(u, a) < 0; }
};

Vector random_vector(size_t n, std::mt19937_64& bits, double scale) {
  std::normal_distribution<double> normal(0, scale);
  Vector x(n);
  for (double& v : x) v = normal(bits);
  return x;
}

// Pairs of several sizes and relative lengths, half of them in conflict.
std::vector<Gradients> pairs(bool conflict) {
  std::vector<Gradients> result;
  std::mt19937_64 bits(11);
  for (size_t n : {size_t{1}, size_t{2}, size_t{5}, size_t{64}}) {
    for (double scale : {0.01, 1.0, 30.0}) {
      Gradients g{random_vector(n, bits, 1), random_vector(n, bits, scale)};
      if (g.conflict() != conflict) g.a = mix(-1, g.a, 0, g.a);
      EXPECT_EQ(g.conflict(), conflict);
      result.push_back(g);
    }
  }
  return result;
}

std::vector<Gradients> all_pairs() {
  auto result = pairs(true);
  for (auto& g : pairs(false)) result.push_back(g);
  return result;
}

void expect_same(const Vector& got, const Vector& expected, const Gradients& g) {
  const double scale = norm(g.u) + norm(g.a);
  EXPECT_LE(norm(mix(1, got, -1, expected)), kRounding * scale)
      << "u·a = " << dot(g.u, g.a) << " in " << g.u.size() << " dimensions";
}

Gram gram_of(double uu, double ua, double aa) {
  Gram gram(2);
  gram.at(0, 0) = uu;
  gram.at(0, 1) = gram.at(1, 0) = ua;
  gram.at(1, 1) = aa;
  return gram;
}

const Rule kEveryRule[] = {Rule::sft,    Rule::weighted_sum, Rule::safegrad, Rule::agem,
                           Rule::pcgrad, Rule::mgda,         Rule::cagrad,   Rule::ogpsa};

TEST(Surgery, SftIsTheTaskGradientAndWeightedSumAddsRhoTimesAlignment) {
  for (const auto& g : all_pairs()) {
    expect_same(g.combined({.rule = Rule::sft}), g.u, g);
    expect_same(g.combined({.rule = Rule::weighted_sum, .rho = 0.3}), mix(1, g.u, 0.3, g.a), g);
  }
}

TEST(Surgery, SafegradFollowsEquations3To5) {
  for (const auto& g : all_pairs()) {
    for (double rho : {0.0, 0.3, 1.0, 2.0}) {
      const Vector task = g.conflict() ? without(g.u, g.a) : g.u;
      const Vector expected = mix(1, task, rho, g.a);
      expect_same(g.combined({.rule = Rule::safegrad, .rho = rho}), expected, g);
    }
  }
}

TEST(Surgery, AgemProjectsOnConflictAndAddsNothing) {
  for (const auto& g : all_pairs()) {
    expect_same(g.combined({.rule = Rule::agem}), g.conflict() ? without(g.u, g.a) : g.u, g);
  }
}

TEST(Surgery, PcgradProjectsEachOnTheOtherAsItWasThenAdds) {
  for (const auto& g : all_pairs()) {
    const Vector task = g.conflict() ? without(g.u, g.a) : g.u;
    const Vector align = g.conflict() ? without(g.a, g.u) : g.a;
    expect_same(g.combined({.rule = Rule::pcgrad}), mix(1, task, 1, align), g);
  }
}

TEST(Surgery, OgpsaProjectsWithEitherSign) {
  for (const auto& g : all_pairs()) {
    expect_same(g.combined({.rule = Rule::ogpsa}), without(g.u, g.a), g);
  }
}

TEST(Surgery, ProjectionsLeaveNothingAlongTheAlignmentGradient) {
  for (const auto& g : pairs(true)) {
    ASSERT_LT(cosine(g.gram()), -1e-3);
    for (const RuleOptions& options :
         {RuleOptions{.rule = Rule::safegrad, .rho = 0}, RuleOptions{.rule = Rule::agem},
          RuleOptions{.rule = Rule::ogpsa}}) {
      const Vector projected = g.combined(options);
      EXPECT_LE(std::abs(dot(projected, g.a)), kRounding * norm(g.u) * norm(g.a));
    }
  }
}

TEST(Surgery, MgdaIsTheShortestPointOfTheSegment) {
  for (const auto& g : all_pairs()) {
    double best = 1, shortest = std::numeric_limits<double>::infinity();
    constexpr int kSteps = 20000;
    for (int i = 0; i <= kSteps; ++i) {
      const double gamma = static_cast<double>(i) / kSteps;
      const double length = norm(mix(gamma, g.u, 1 - gamma, g.a));
      if (length < shortest) shortest = length, best = gamma;
    }
    const auto c = combine(g.gram(), {.rule = Rule::mgda});
    EXPECT_NEAR(c[0], best, 1.0 / kSteps);  // the grid's step
    EXPECT_NEAR(c[0] + c[1], 1, 1e-15);
    EXPECT_LE(norm(mix(c[0], g.u, c[1], g.a)), shortest + kRounding * norm(g.u));
  }
}

TEST(Surgery, MgdaStopsAtTheShorterGradientWhenThatIsClosest) {
  const auto only_task = combine(gram_of(1, 2, 9), {.rule = Rule::mgda});
  EXPECT_EQ(only_task, (Vector{1, 0}));
  const auto only_alignment = combine(gram_of(9, 2, 1), {.rule = Rule::mgda});
  EXPECT_EQ(only_alignment, (Vector{0, 1}));
}

// The definition: of all d within c |g0| of the mean gradient g0, the one whose worse inner product
// with u and a is largest. Only the plane of u and a matters, so a fine polar grid covers it.
TEST(Surgery, CagradIsTheBestWorstCaseWithinItsRadius) {
  for (const auto& g : all_pairs()) {
    if (g.u.size() < 2) continue;
    for (double c : {0.0, 0.4, 0.9}) {
      const Vector mean = mix(0.5, g.u, 0.5, g.a);
      const Vector got = g.combined({.rule = Rule::cagrad, .cagrad_c = c});
      auto worst = [&](const Vector& d) { return std::min(dot(g.u, d), dot(g.a, d)); };
      const double size = norm(mean) * (norm(g.u) + norm(g.a));

      const Vector e1 = mix(1 / norm(g.u), g.u, 0, g.u);
      Vector e2 = without(g.a, g.u);
      e2 = mix(1 / norm(e2), e2, 0, e2);
      double best = -std::numeric_limits<double>::infinity();
      for (double radius : {0.0, 0.5, 1.0}) {
        for (int i = 0; i < 4000; ++i) {
          const double angle = 2 * M_PI * i / 4000, r = radius * c * norm(mean);
          const Vector step = mix(r * std::cos(angle), e1, r * std::sin(angle), e2);
          best = std::max(best, worst(mix(1, mean, 1, step)));
        }
      }

      // The golden-section search ends where rounding hides differences of F: √ε in w, and as F is
      // flat there, ε in F; c |g0| / |g_w| then carries √ε into the length.
      EXPECT_LE(norm(mix(1, got, -1, mean)), c * norm(mean) * (1 + 1e-7) + kRounding * size);
      EXPECT_GE(worst(got), best - 1e-7 * size);
    }
  }
}

TEST(Surgery, NoProjectionWhileTheAlignmentGradientIsAtTheGuard) {
  const double above = std::nextafter(kProjectionGuard, 1.0);
  const Gram at_guard = gram_of(4, -1e-6, kProjectionGuard), past = gram_of(4, -1e-6, above);

  EXPECT_EQ(combine(at_guard, {.rule = Rule::safegrad, .rho = 0.5}), (Vector{1, 0.5}));
  EXPECT_EQ(combine(at_guard, {.rule = Rule::agem})[1], 0);
  EXPECT_EQ(combine(at_guard, {.rule = Rule::ogpsa})[1], 0);
  EXPECT_EQ(combine(at_guard, {.rule = Rule::pcgrad})[1], 1);

  EXPECT_EQ(combine(past, {.rule = Rule::safegrad, .rho = 0.5})[1], 0.5 + 1e-6 / above);
  EXPECT_EQ(combine(past, {.rule = Rule::agem})[1], 1e-6 / above);
  EXPECT_EQ(combine(past, {.rule = Rule::ogpsa})[1], 1e-6 / above);
  EXPECT_EQ(combine(past, {.rule = Rule::pcgrad})[1], 1 + 1e-6 / above);
}

TEST(Surgery, ALargeCoefficientIsNotClippedAndRemovesAtMostTheTaskGradient) {
  const Gram gram = gram_of(1e8, -0.9e4 * 1e-4, 1e-8);  // |u| = 1e4, |a| = 1e-4, cosine -0.9
  const auto c = combine(gram, {.rule = Rule::safegrad, .rho = 1});
  EXPECT_NEAR(c[1], 1 + 0.9e8, 1);
  EXPECT_LE(combined_norm(gram, c), 1e4);
}

TEST(Surgery, ZeroGradientsGiveFiniteCoefficientsUnderEveryRule) {
  for (const Gram& gram : {gram_of(0, 0, 0), gram_of(3, 0, 0), gram_of(0, 0, 3)}) {
    for (Rule rule : kEveryRule) {
      const auto c = combine(gram, {.rule = rule});
      ASSERT_EQ(c.size(), 2u);
      EXPECT_TRUE(std::isfinite(c[0]) && std::isfinite(c[1]));
    }
    EXPECT_EQ(combine(gram, {.rule = Rule::safegrad, .rho = 1}), (Vector{1, 1}));
    EXPECT_EQ(cosine(gram), 0);
  }
}

TEST(Surgery, OneObjectiveIsPlainTrainingUnderEveryRuleAndThreeAreRefused) {
  Gram one(1);
  one.at(0, 0) = 2;
  for (Rule rule : kEveryRule) EXPECT_EQ(combine(one, {.rule = rule}), Vector{1});
  EXPECT_THROW(combine(Gram(3), {}), UsageError);
  EXPECT_THROW(combine(Gram(0), {}), UsageError);
}

TEST(Surgery, TheNormFromTheGramMatrixIsThatOfTheVector) {
  for (const auto& g : all_pairs()) {
    if (g.u.size() == 1) continue;  // projections to exactly 0: only rounding would be compared
    for (Rule rule : kEveryRule) {
      const auto c = combine(g.gram(), {.rule = rule});
      const double expected = norm(mix(c[0], g.u, c[1], g.a));
      // Cancellation: the square is right to ε (|c_u u| + |c_a a|)².
      const double terms = std::abs(c[0]) * norm(g.u) + std::abs(c[1]) * norm(g.a);
      EXPECT_NEAR(combined_norm(g.gram(), c), expected, kRounding * terms * terms / expected);
    }
  }
  Gram one(1);
  one.at(0, 0) = 9;
  EXPECT_EQ(combined_norm(one, {2}), 6);
}

TEST(Surgery, TheNormOfACancellingSumIsNeverNaN) {
  const Gram almost = gram_of(1, -1 - 1e-15, 1);  // rounding made the square negative
  EXPECT_EQ(combined_norm(almost, {1, 1}), 0);
}

TEST(Surgery, CosineIsThatOfTheVectorsAndSurvivesExtremeLengths) {
  for (const auto& g : all_pairs()) {
    EXPECT_NEAR(cosine(g.gram()), dot(g.u, g.a) / (norm(g.u) * norm(g.a)), kRounding);
  }
  // uu · aa would underflow.
  EXPECT_NEAR(cosine(gram_of(1e-200, -0.5e-200, 1e-200)), -0.5, 1e-14);
}

TEST(Surgery, ClipScalesDownToTheLimitAsTorchDoes) {
  EXPECT_EQ(clip_factor(4, 1), 1 / (4 + 1e-6));
  EXPECT_EQ(clip_factor(0.5, 1), 1);
  EXPECT_EQ(clip_factor(0, 1), 1);
  EXPECT_EQ(clip_factor(1e9, 0), 1);  // off
}

TEST(Surgery, FiniteNoticesEveryEntry) {
  EXPECT_TRUE(gram_of(1, -2, 3).finite());
  for (double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    for (size_t i = 0; i < 4; ++i) {
      Gram gram = gram_of(1, -2, 3);
      gram.values[i] = bad;
      EXPECT_FALSE(gram.finite());
    }
  }
}

TEST(Surgery, LisaIsNoFunctionOfInnerProducts) {
  EXPECT_THROW(combine(Gram(2), {.rule = Rule::lisa}), UsageError);
}

TEST(LayerWiseSurgery, EveryBlockIsJudgedByItselfAndTheNormIsTheWholes) {
  // u = (3, 0 | 1, 2), a = (−1, 1 | 1, 0): the halves are the blocks.
  Gram first(2), second(2);
  first.values = {9, -3, -3, 2};
  second.values = {5, 1, 1, 1};
  const RuleOptions options{Rule::safegrad, 0.25, 0.4};

  const auto c = combine_blocks({first, second}, options);

  EXPECT_EQ(c, (std::vector<std::vector<double>>{{1, 0.25 + 1.5}, {1, 0.25}}));
  // g = (1.25, 1.75 | 1.25, 2). 1e-15: a root, a square and a sum in doubles.
  EXPECT_NEAR(combined_norm({first, second}, c),
              std::sqrt(1.25 * 1.25 + 1.75 * 1.75 + 1.25 * 1.25 + 4), 4e-15);
  // The whole has u·a = −2 and a·a = 3: another decision.
  Gram whole(2);
  whole.values = {14, -2, -2, 3};
  EXPECT_NE(combine(whole, options)[1], c[0][1]);
}

}  // namespace
}  // namespace safegrad
