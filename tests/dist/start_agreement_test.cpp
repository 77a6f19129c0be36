// start_agreement_test.cpp: ranks that were given different things are told which ranks and what.
#include "dist/start_agreement.h"

#include <numeric>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "dist/forwarding_communicator.h"
#include "dist/job_failed.h"
#include "dist/rank_main.h"

namespace safegrad::testing {
namespace {

using dist::Fact;

/// Counts the exchanges that it hands on.
class Counting : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;
  std::unique_ptr<dist::Communicator> split(int colour) override { return inner_->split(colour); }
  std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) override {
    ++gathers;
    words_gathered += words.size();
    return inner_->all_gather_words(words);
  }
  std::string broadcast(const std::string& text, int root) override {
    ++broadcasts;
    return inner_->broadcast(text, root);
  }
  int gathers = 0, broadcasts = 0;
  size_t words_gathered = 0;
};

const std::vector<Fact> kFacts = {
    {"model weights", "3fa9"}, {"optimizer.lr", "0.001"}, {"threads", "2", true}};

class StartAgreement : public ::testing::Test {
 protected:
  StartAgreement() : world_(world()) {}
  int last() const { return world_.size() - 1; }
  bool is_last() const { return world_.rank() == last(); }

  /// The text that leaves, on rank 0; "agreed" where nothing does. Elsewhere it must be empty.
  std::string outcome(const std::vector<Fact>& facts) {
    try {
      dist::check_same_start(world_, facts, warnings_);
    } catch (const dist::JobFailed& e) {
      EXPECT_EQ(e.exit_code(), 1);
      if (world_.rank() == 0) return e.what();
      EXPECT_STREQ(e.what(), "");
      return "told by rank 0";
    }
    return "agreed";
  }
  /// The same on every rank: what rank 0 is to say, or agreement.
  void expect(const std::string& got, const std::string& part) {
    if (world_.rank() > 0) {
      EXPECT_EQ(got, "told by rank 0");
    } else {
      EXPECT_NE(got.find(part), std::string::npos) << part << " is not in: " << got;
    }
  }
  /// "rank 0", "ranks 0, 1", "ranks 0-2": all but the last.
  std::string others() const {
    std::vector<int> ranks(static_cast<size_t>(last()));
    std::iota(ranks.begin(), ranks.end(), 0);
    return fmt::format("{} {}", last() == 1 ? "rank" : "ranks", dist::list_ranks(ranks));
  }

  Counting world_;
  std::vector<std::string> warnings_;
};

TEST_F(StartAgreement, CostsOneExchangeOfTwoWordsWhereAllAgree) {
  EXPECT_EQ(outcome(kFacts), "agreed");
  EXPECT_EQ(world_.gathers, 1);
  EXPECT_EQ(world_.words_gathered, 2u);
  EXPECT_EQ(world_.broadcasts, 0);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(StartAgreement, ADifferenceNamesFactValuesAndRanks) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts = kFacts;
  if (is_last()) facts[0].value = "77c0";

  expect(outcome(facts),
         fmt::format(": model weights: 3fa9 on {}; 77c0 on rank {}; give", others(), last()));
  EXPECT_EQ(world_.broadcasts, 2) << "one rank of each opinion speaks";
}

TEST_F(StartAgreement, EveryRankWithAnotherValueIsListedByItself) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts = kFacts;
  facts[1].value = fmt::format("0.{}", world_.rank());

  std::string values;
  for (int r = 0; r <= last(); ++r)
    values += fmt::format("{}0.{} on rank {}", r == 0 ? "" : "; ", r, r);
  expect(outcome(facts), ": optimizer.lr: " + values + "; give");
}

TEST_F(StartAgreement, SeveralDifferencesAreToldTogether) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts = kFacts;
  if (is_last()) facts[0].value = "77c0";
  if (world_.rank() == 0) facts.push_back({"probe[0].name", "a | 3:b"});

  const std::string got = outcome(facts);
  const std::string rest = last() == 1   ? fmt::format("rank {}", last())
                           : last() == 2 ? "ranks 1, 2"
                                         : fmt::format("ranks 1-{}", last());
  expect(got, fmt::format("77c0 on rank {} | probe[0].name: a | 3:b on rank 0; not given on {}",
                          last(), rest));
}

TEST_F(StartAgreement, WhatMayDifferIsAWarningOnEveryRank) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts = kFacts;
  if (is_last()) facts[2].value = "64";

  EXPECT_EQ(outcome(facts), "agreed");
  EXPECT_EQ(warnings_,
            std::vector<std::string>{fmt::format(
                "the ranks differ in threads: 2 on {}; 64 on rank {}", others(), last())});
}

TEST_F(StartAgreement, WhatMayDifferHidesNothingElse) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts = kFacts;
  facts[2].value = fmt::format("{}", world_.rank());
  if (is_last()) facts[1].value = "0.1";

  const std::string got = outcome(facts);
  expect(got, fmt::format("optimizer.lr: 0.001 on {}; 0.1 on rank {}; give", others(), last()));
  EXPECT_EQ(got.find("threads"), std::string::npos);
}

TEST_F(StartAgreement, ManyDifferencesAreCounted) {
  if (last() == 0) GTEST_SKIP() << "one rank agrees with itself";
  std::vector<Fact> facts;
  for (int i = 0; i < 30; ++i) facts.push_back({fmt::format("key{:02}", i), is_last() ? "b" : "a"});

  const std::string got = outcome(facts);
  expect(got, " | and 18 more; give");
  EXPECT_EQ(got.find("key12"), std::string::npos) << "12 of 30 are listed";
}

TEST(ListRanks, RunsAreShort) {
  EXPECT_EQ(dist::list_ranks({}), "");
  EXPECT_EQ(dist::list_ranks({3}), "3");
  EXPECT_EQ(dist::list_ranks({0, 1}), "0, 1");
  EXPECT_EQ(dist::list_ranks({0, 1, 2, 5, 7, 8, 9}), "0-2, 5, 7-9");
}

}  // namespace
}  // namespace safegrad::testing
