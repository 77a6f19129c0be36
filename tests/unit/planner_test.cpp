#include "core/planner.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <random>

#include <gtest/gtest.h>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

constexpr int64_t kBudget = 64;

Stream stream(int64_t samples, int64_t per_step, uint64_t seed) {
  std::mt19937_64 bits(seed);
  Stream s;
  for (int64_t i = 0; i < samples; ++i) {
    s.lengths.push_back(2 + static_cast<int64_t>(bits() % (kBudget - 1)));
    s.scored.push_back(1 + static_cast<int64_t>(bits() % static_cast<uint64_t>(s.lengths.back())));
  }
  s.per_step = per_step;
  return s;
}

struct Setting {
  int64_t ranks = 1, max_tokens = kBudget;
  uint64_t seed = 43;
  int64_t total = 0;
  double scored_cost = 0.5;
};

Planner planner(const std::vector<Stream>& streams, const Setting& s) {
  return Planner(streams, s.ranks, s.max_tokens, s.seed, s.total, s.scored_cost);
}

using Pairs = std::vector<std::pair<size_t, int64_t>>;

Pairs pairs_of(const std::vector<Draw>& draws) {
  Pairs result;
  for (const Draw& draw : draws) result.emplace_back(draw.objective, draw.sample);
  return result;
}

std::vector<Draw> all_draws(const StepPlan& plan) {
  std::vector<Draw> result;
  for (const auto& micro_batch : plan.assignment) {
    for (const auto& draws : micro_batch) result.insert(result.end(), draws.begin(), draws.end());
  }
  return result;
}

std::vector<int64_t> samples_of(const Planner& p, size_t objective, int64_t steps) {
  std::vector<int64_t> result;
  for (int64_t step = 0; step < steps; ++step) {
    for (const Draw& draw : p.draws(step)) {
      if (draw.objective == objective) result.push_back(draw.sample);
    }
  }
  return result;
}

bool is_permutation_of_range(std::vector<int64_t> values) {
  std::sort(values.begin(), values.end());
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] != static_cast<int64_t>(i)) return false;
  }
  return true;
}

double cost(const Stream& s, int64_t sample, double scored_cost) {
  const auto i = static_cast<size_t>(sample);
  return static_cast<double>(s.lengths[i]) + scored_cost * static_cast<double>(s.scored[i]);
}

TEST(EpochOrder, IsAPermutationThatDependsOnSeedObjectiveAndEpochAlone) {
  for (int64_t n : {1, 2, 3, 257}) EXPECT_TRUE(is_permutation_of_range(epoch_order(n, 1, 0, 0)));
  const auto order = epoch_order(257, 1, 0, 0);
  EXPECT_EQ(order, epoch_order(257, 1, 0, 0));
  EXPECT_NE(order, epoch_order(257, 2, 0, 0));
  EXPECT_NE(order, epoch_order(257, 1, 1, 0));
  EXPECT_NE(order, epoch_order(257, 1, 0, 1));
}

TEST(EpochOrder, EveryOrderOfThreeIsAboutEquallyLikely) {
  std::map<std::vector<int64_t>, int> count;
  for (int64_t epoch = 0; epoch < 6000; ++epoch) ++count[epoch_order(3, 9, 0, epoch)];
  ASSERT_EQ(count.size(), 6u);
  // 1000 expected; the standard deviation is √(6000 · 5/36) = 29, and five of them pass.
  for (const auto& [order, n] : count) EXPECT_NEAR(n, 1000, 145);
}

TEST(Planner, DrawsEverySampleOnceAnEpochAcrossStepBoundaries) {
  const Planner p = planner({stream(20, 7, 1), stream(9, 4, 2)}, {});
  for (size_t k : {0, 1}) {
    const size_t n = k == 0 ? 20 : 9;
    const auto drawn = samples_of(p, k, 30);
    ASSERT_GE(drawn.size(), 5 * n);
    std::vector<int64_t> previous;
    for (size_t epoch = 0; epoch < 5; ++epoch) {
      const auto begin = drawn.begin() + static_cast<std::ptrdiff_t>(epoch * n);
      const std::vector<int64_t> order(begin, begin + static_cast<std::ptrdiff_t>(n));
      EXPECT_TRUE(is_permutation_of_range(order)) << "objective " << k << ", epoch " << epoch;
      EXPECT_NE(order, previous) << "the order repeats";
      previous = order;
    }
  }
}

TEST(Planner, AStepLargerThanTheDataDrawsSeveralEpochs) {
  const auto drawn = samples_of(planner({stream(3, 8, 1)}, {}), 0, 1);
  ASSERT_EQ(drawn.size(), 8u);
  EXPECT_TRUE(is_permutation_of_range({drawn.begin(), drawn.begin() + 3}));
  EXPECT_TRUE(is_permutation_of_range({drawn.begin() + 3, drawn.begin() + 6}));
}

TEST(Planner, DrawsDoNotDependOnRanksOrBudgetOrTheOrderOfQuestions) {
  const std::vector<Stream> streams = {stream(20, 7, 1), stream(9, 4, 2)};
  const Planner one = planner(streams, {});
  const Planner many = planner(streams, {.ranks = 5, .max_tokens = 1000, .scored_cost = 9});
  for (int64_t step = 11; step >= 0; --step) {
    EXPECT_EQ(pairs_of(one.draws(step)), pairs_of(many.draws(step)));
  }
  EXPECT_EQ(pairs_of(planner(streams, {}).draws(7)), pairs_of(one.draws(7)));
  EXPECT_NE(pairs_of(planner(streams, {.seed = 44}).draws(7)), pairs_of(one.draws(7)));
}

TEST(Planner, APlanHoldsItsDrawsOnceWithinTheBudgetOnEveryRankAlike) {
  const std::vector<Stream> streams = {stream(50, 13, 1), stream(20, 6, 2)};
  for (int64_t ranks : {1, 2, 3, 8}) {
    for (int64_t max_tokens : {kBudget, 3 * kBudget, 100 * kBudget}) {
      const Planner p = planner(streams, {.ranks = ranks, .max_tokens = max_tokens});
      for (int64_t step = 0; step < 5; ++step) {
        const StepPlan plan = p.plan(step);
        Pairs expected = pairs_of(p.draws(step)), got = pairs_of(all_draws(plan));
        ASSERT_EQ(expected.size(), 19u);
        std::sort(expected.begin(), expected.end());
        std::sort(got.begin(), got.end());
        EXPECT_EQ(got, expected);

        ASSERT_GE(plan.assignment.size(), 1u);
        for (const auto& micro_batch : plan.assignment) {
          ASSERT_EQ(micro_batch.size(), static_cast<size_t>(ranks));
          for (const auto& draws : micro_batch) {
            int64_t tokens = 0;
            for (const Draw& d : draws) {
              tokens += streams[d.objective].lengths[static_cast<size_t>(d.sample)];
            }
            EXPECT_LE(tokens, max_tokens);
            EXPECT_TRUE(std::is_sorted(
                draws.begin(), draws.end(),
                [](const Draw& a, const Draw& b) { return a.objective < b.objective; }));
          }
        }
      }
    }
  }
}

TEST(Planner, RunsNoMoreMicroBatchesThanTheTokensNeed) {
  Stream equal;
  equal.lengths.assign(24, 16);
  equal.scored.assign(24, 8);
  equal.per_step = 24;  // 384 tokens, four sequences fill a budget of 64
  for (int64_t ranks : {1, 2, 3, 6}) {
    const StepPlan plan = planner({equal}, {.ranks = ranks}).plan(0);
    EXPECT_EQ(plan.assignment.size(), static_cast<size_t>(6 / ranks));
  }
}

TEST(Planner, UnevenLengthsThatDoNotFillTheBudgetGetOneMicroBatchMore) {
  Stream odd;
  odd.lengths = {40, 40, 40};  // 120 tokens would fit in two bins of 64 if they could be cut
  odd.scored = {1, 1, 1};
  odd.per_step = 3;
  EXPECT_EQ(planner({odd}, {}).plan(0).assignment.size(), 3u);
}

// Longest first into the cheapest bin: what went last into a bin is its cheapest sample, and
// without it that bin was the cheapest of all.
TEST(Planner, BalancesCostUpToTheCheapestSampleOfTheFullestRank) {
  for (double scored_cost : {0.0, 20.0}) {
    for (int64_t ranks : {2, 3, 8}) {
      const Stream s = stream(200, 60, 3);
      const Planner p =
          planner({s}, {.ranks = ranks, .max_tokens = 100 * kBudget, .scored_cost = scored_cost});
      for (int64_t step = 0; step < 3; ++step) {
        const StepPlan plan = p.plan(step);
        ASSERT_EQ(plan.assignment.size(), 1u);
        double lightest = 1e300, heaviest = 0, last_of_heaviest = 0;
        for (const auto& draws : plan.assignment[0]) {
          double load = 0, cheapest = 1e300;
          for (const Draw& d : draws) {
            load += cost(s, d.sample, scored_cost);
            cheapest = std::min(cheapest, cost(s, d.sample, scored_cost));
          }
          lightest = std::min(lightest, load);
          if (load > heaviest) heaviest = load, last_of_heaviest = cheapest;
        }
        EXPECT_LE(heaviest - last_of_heaviest, lightest + 1e-9);  // 1e-9: sums in another order
      }
    }
  }
}

TEST(Planner, TheTaskStreamEndsAfterItsTotalAndTheLastStepIsSmaller) {
  const std::vector<Stream> streams = {stream(10, 4, 1), stream(5, 4, 2)};
  const Planner p = planner(streams, {.ranks = 2, .total = 10});
  auto task_draws = [&](int64_t step) {
    const auto draws = p.draws(step);
    return std::count_if(draws.begin(), draws.end(),
                         [](const Draw& d) { return d.objective == 0; });
  };
  EXPECT_EQ(task_draws(0), 4);
  EXPECT_EQ(task_draws(1), 4);
  EXPECT_EQ(task_draws(2), 2);
  EXPECT_EQ(p.draws(2).size(), 6u);  // the alignment stream never ends
  EXPECT_EQ(all_draws(p.plan(2)).size(), 6u);
  EXPECT_TRUE(is_permutation_of_range(samples_of(p, 0, 3)));
}

TEST(Planner, AStreamThatIsDueNowAndThenSkipsNoSample) {
  Stream task = stream(20, 7, 1), align = stream(9, 4, 2);
  const Planner always = planner({task, align}, {});
  align.turns = {3, 0, 1};
  const Planner third = planner({task, align}, {});
  auto of = [](const std::vector<Draw>& draws, size_t objective) {
    Pairs pairs = pairs_of(draws);
    std::erase_if(pairs, [&](const auto& pair) { return pair.first != objective; });
    return pairs;
  };
  for (int64_t step = 0; step < 10; ++step) {
    EXPECT_EQ(of(third.draws(step), 0), of(always.draws(step), 0));
    EXPECT_EQ(of(third.draws(step), 1), step % 3 == 0 ? of(always.draws(step / 3), 1) : Pairs{});
    EXPECT_EQ(of(third.draws(step, true), 1), of(always.draws(step / 3), 1));
    EXPECT_EQ(all_draws(third.plan(step)).size(), third.draws(step).size());
    EXPECT_EQ(all_draws(third.plan(step, true)).size(), 7u + 4u);
  }
}

TEST(Planner, WhatIsLeftOutDoesNotRunAndMovesNothing) {
  const Planner p = planner({stream(20, 7, 1), stream(9, 4, 2)}, {.ranks = 3});
  const std::vector<Draw> drawn = p.draws(1);
  std::vector<int64_t> out = {drawn[2].sample, drawn[5].sample};
  std::sort(out.begin(), out.end());
  Pairs expected = pairs_of(drawn);
  std::erase_if(expected, [&](const auto& pair) {
    return pair.first == 0 && (pair.second == out[0] || pair.second == out[1]);
  });
  ASSERT_EQ(expected.size(), 7u - 2 + 4);
  Pairs found = pairs_of(all_draws(p.plan(1, false, out)));
  std::sort(expected.begin(), expected.end());
  std::sort(found.begin(), found.end());
  EXPECT_EQ(found, expected) << "the alignment samples of these numbers run";
  EXPECT_EQ(pairs_of(p.draws(2)),
            pairs_of(planner({stream(20, 7, 1), stream(9, 4, 2)}, {}).draws(2)));

  const StepPlan plan = p.plan(1);
  const auto by_rank = samples_by_rank(plan, 1);
  ASSERT_EQ(by_rank.size(), 3u);
  for (size_t r = 0; r < by_rank.size(); ++r) {
    std::vector<int64_t> own;
    for (const auto& micro_batch : plan.assignment) {
      for (const Draw& draw : micro_batch[r]) {
        if (draw.objective == 1) own.push_back(draw.sample);
      }
    }
    EXPECT_EQ(by_rank[r], own);
  }
}

TEST(Planner, ObjectivesTakeTurnsAndSkipNoSample) {
  Stream task = stream(20, 7, 1), align = stream(9, 4, 2);
  const Planner always = planner({task, align}, {});
  task.turns = {5, 2, 3};
  align.turns = {5, 0, 2};
  const Planner turns = planner({task, align}, {});
  std::array<int64_t, 2> taken = {0, 0};
  for (int64_t step = 0; step < 13; ++step) {
    const size_t objective = step % 5 < 2 ? 1 : 0;
    Pairs expected = pairs_of(always.draws(taken[objective]));
    std::erase_if(expected, [&](const auto& pair) { return pair.first != objective; });
    EXPECT_EQ(pairs_of(turns.draws(step)), expected) << step;
    const Turns& own = objective == 0 ? task.turns : align.turns;
    EXPECT_EQ(own.before(step), taken[objective]);
    EXPECT_EQ(own.step_of(taken[objective]), step);
    ++taken[objective];
  }
}

TEST(Planner, MoreRanksThanSamplesLeaveSomeWithoutWork) {
  const StepPlan plan = planner({stream(10, 2, 1)}, {.ranks = 7}).plan(0);
  ASSERT_EQ(plan.assignment.size(), 1u);
  ASSERT_EQ(plan.assignment[0].size(), 7u);
  EXPECT_EQ(all_draws(plan).size(), 2u);
  for (const auto& draws : plan.assignment[0]) EXPECT_LE(draws.size(), 1u);
}

TEST(Planner, ASampleLongerThanTheBudgetIsRefusedByName) {
  Stream task = stream(4, 2, 1), align = stream(4, 2, 2);
  align.lengths[2] = 65;
  test::expect_refused<DataError>(
      [&] {
        planner({task, align}, {.max_tokens = 64});
      },
      {"batch.max_tokens_per_rank", "64", "sequence 2", "65", "max-length"});
  EXPECT_NO_THROW(planner({task, align}, {.max_tokens = 65}));
}

}  // namespace
}  // namespace safegrad
