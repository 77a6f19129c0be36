#include "core/pack.h"

#include <memory>

#include <gtest/gtest.h>

#include "core/error.h"
#include "unit/numbers.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using test::expect_equal;
using test::indices;
using test::TempFolder;
using test::tensor_of;
using test::TestTensor;

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  int32_t group = 0, choice = 0;
};

class Pack : public ::testing::Test {
 protected:
  TokenFile file(const std::vector<Sequence>& sequences, bool choices = false) {
    std::vector<int32_t> tokens, group, choice;
    std::vector<uint8_t> mask;
    std::vector<int64_t> offsets = {0};
    for (const Sequence& s : sequences) {
      tokens.insert(tokens.end(), s.tokens.begin(), s.tokens.end());
      mask.insert(mask.end(), s.mask.begin(), s.mask.end());
      offsets.push_back(static_cast<int64_t>(tokens.size()));
      group.push_back(s.group);
      choice.push_back(s.choice);
    }
    auto column = [](const char* name, Dtype dtype, const auto& values) {
      return tensor_of(name, dtype, {static_cast<int64_t>(values.size())}, values);
    };
    std::vector<TestTensor> tensors = {column("tokens", Dtype::i32, tokens),
                                       column("loss_mask", Dtype::u8, mask),
                                       column("offsets", Dtype::i64, offsets)};
    std::map<std::string, std::string> metadata = {{"format", "safegrad.tokens/1"}};
    if (choices) {
      tensors.push_back(column("group", Dtype::i32, group));
      tensors.push_back(column("choice", Dtype::i32, choice));
      metadata["classes"] = R"(["refuse", "comply"])";
    }
    const std::string path = folder_ / fmt::format("{}.safetensors", ++files_);
    test::write_tensors(path, tensors, metadata);
    return TokenFile(path, {}, warnings_);
  }

  const TokenFile& task() {
    if (!task_) {
      task_ = std::make_unique<TokenFile>(file({{{10, 11, 12, 13}, {0, 0, 1, 1}},
                                                {{20, 21}, {0, 1}},
                                                {{30, 31, 32, 33, 34}, {0, 1, 0, 0, 1}}}));
    }
    return *task_;
  }
  const TokenFile& align() {
    if (!align_) {
      align_ = std::make_unique<TokenFile>(file({{{40, 41, 42}, {0, 0, 1}}, {{50, 51}, {0, 1}}}));
    }
    return *align_;
  }

  static ObjectiveData data_of(const TokenFile& file) { return {&file, false, {}}; }
  std::vector<ObjectiveData> both() { return {data_of(task()), data_of(align())}; }

  TempFolder folder_;
  int files_ = 0;
  std::vector<std::string> warnings_;
  std::unique_ptr<TokenFile> task_, align_;
};

TEST_F(Pack, LaysSequencesEndToEndAndScoresWhatPrecedesAMaskedToken) {
  const PackedBatch batch = pack({{0, 2}, {0, 0}, {1, 1}}, both(), {});

  expect_equal(batch.tokens, indices({30, 31, 32, 33, 34, 10, 11, 12, 13, 50, 51}));
  expect_equal(batch.positions, indices({0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1}));
  EXPECT_EQ(batch.cu_seqlens, (std::vector<int64_t>{0, 5, 9, 11}));
  EXPECT_EQ(batch.segments, (std::vector<int64_t>{0, 9, 11}));
  expect_equal(batch.scored, indices({0, 3, 6, 7, 9}));
  expect_equal(batch.targets, indices({31, 34, 12, 13, 51}));
  EXPECT_EQ(batch.scored_segments, (std::vector<int64_t>{0, 4, 5}));
  EXPECT_EQ(batch.size(), 11);
  EXPECT_EQ(batch.sequences(), 3);
  EXPECT_EQ(batch.objectives(), 2u);
  EXPECT_TRUE(batch.parents.empty());
  EXPECT_FALSE(batch.dropout_keys.defined());
  expect_equal(batch.boundaries, indices({0, 5, 9, 11}).to(at::kInt));
  EXPECT_EQ(batch.longest, 5);
  EXPECT_EQ(batch.positions_end, 5);
  EXPECT_FALSE(batch.reference_hidden.defined());
  EXPECT_TRUE(batch.adapters);
}

TEST_F(Pack, AnObjectiveOrARankWithoutDrawsIsEmptyButThere) {
  const PackedBatch alignment_only = pack({{1, 0}}, both(), {});
  EXPECT_EQ(alignment_only.segments, (std::vector<int64_t>{0, 0, 3}));
  EXPECT_EQ(alignment_only.scored_segments, (std::vector<int64_t>{0, 0, 1}));

  const PackedBatch nothing = pack({}, both(), {.dropout = true});
  EXPECT_EQ(nothing.size(), 0);
  EXPECT_EQ(nothing.sequences(), 0);
  EXPECT_EQ(nothing.objectives(), 2u);
  EXPECT_EQ(nothing.tokens.numel(), 0);
  EXPECT_EQ(nothing.tokens.scalar_type(), at::kLong);
  EXPECT_EQ(nothing.scored_segments, (std::vector<int64_t>{0, 0, 0}));
}

TEST_F(Pack, AllPositionsScoresEveryRowAndCountsSo) {
  const ObjectiveData all{&align(), true, {}}, response{&align(), false, {}};
  const PackedBatch batch = pack({{0, 0}, {0, 1}}, {all}, {});
  expect_equal(batch.scored, indices({0, 1, 2, 3, 4}));
  ASSERT_EQ(batch.targets.numel(), 5);
  EXPECT_EQ(scored_rows(all, 0), 3);
  EXPECT_EQ(scored_rows(response, 0), 1);
}

TEST_F(Pack, ReferenceRowsFollowTheOrderOfTheDraws) {
  ObjectiveData with_reference{&align(), false, [](int64_t sample) {
                                 return at::full({1, 2}, static_cast<double>(sample), at::kFloat);
                               }};
  const PackedBatch batch = pack({{0, 1}, {1, 1}, {1, 0}}, {data_of(task()), with_reference}, {});
  expect_equal(batch.reference_hidden, at::tensor({1.0f, 1.0f, 0.0f, 0.0f}).view({2, 2}));
}

TEST_F(Pack, DropoutKeysNameSeedStepObjectiveAndSampleNotThePlace) {
  const auto data = both();
  const PackOptions options{.dropout = true, .seed = 5, .step = 7};
  // Of each sequence; all of its tokens have the same key.
  auto keys_of = [&](const std::vector<Draw>& draws, const PackOptions& o) {
    const PackedBatch batch = pack(draws, data, o);
    std::vector<int64_t> keys;
    for (int64_t n = 0; n < batch.sequences(); ++n) {
      const int64_t begin = batch.cu_seqlens[static_cast<size_t>(n)];
      const int64_t length = batch.cu_seqlens[static_cast<size_t>(n) + 1] - begin;
      keys.push_back(batch.dropout_keys[begin].item<int64_t>());
      expect_equal(batch.dropout_keys.narrow(0, begin, length), at::full({length}, keys.back()));
    }
    return keys;
  };
  const auto keys = keys_of({{0, 0}, {0, 1}, {1, 0}, {1, 1}}, options);
  ASSERT_EQ(keys.size(), 4u);
  EXPECT_EQ(keys_of({{0, 1}, {1, 0}}, options), (std::vector<int64_t>{keys[1], keys[2]}));
  for (size_t i = 0; i < 4; ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(keys[i], keys[j]);
  }
  EXPECT_NE(keys_of({{0, 0}}, {true, 6, 7})[0], keys[0]);
  EXPECT_NE(keys_of({{0, 0}}, {true, 5, 8})[0], keys[0]);
}

TEST_F(Pack, DrawsOutOfOrderAreRefusedInsteadOfLost) {
  const auto data = both();
  EXPECT_THROW(pack({{1, 0}, {0, 0}}, data, {}), UsageError);
  EXPECT_THROW(pack({{2, 0}}, data, {}), UsageError);
}

TEST_F(Pack, ChoicesShareTheirPromptAndContinueIt) {
  const TokenFile choices = file({{{1, 2, 7}, {0, 0, 1}, 0, 0},
                                  {{1, 2, 8, 9, 6}, {0, 0, 1, 1, 1}, 0, 1},
                                  {{3, 4, 5}, {0, 1, 1}, 1, 0},
                                  {{3, 7}, {0, 1}, 1, 1}},
                                 true);
  const PackedChoices packed = pack_choices({1, 0}, choices, {{0, 1}, {2, 3}});
  const PackedBatch& batch = packed.batch;

  // Group 1: prompt 3, candidate "4 5" needs row 4. Group 0: prompt 1 2, candidate "8 9 6" rows
  // 8 9.
  expect_equal(batch.tokens, indices({3, 4, 1, 2, 8, 9}));
  expect_equal(batch.positions, indices({0, 1, 0, 1, 2, 3}));
  EXPECT_EQ(batch.cu_seqlens, (std::vector<int64_t>{0, 1, 2, 4, 6}));
  EXPECT_EQ(batch.parents, (std::vector<int64_t>{-1, 0, -1, 2}));
  expect_equal(batch.scored, indices({0, 1, 0, 3, 3, 4, 5}));
  expect_equal(batch.targets, indices({4, 5, 7, 7, 8, 9, 6}));
  EXPECT_EQ(packed.candidates, (std::vector<int64_t>{2, 2, 3, 0, 1, 1, 1}));
  EXPECT_EQ(batch.segments, (std::vector<int64_t>{0, 6}));
  EXPECT_EQ(batch.scored_segments, (std::vector<int64_t>{0, 7}));
}

TEST_F(Pack, NoChoicesMakeAnEmptyBatch) {
  const TokenFile choices = file({{{3, 4}, {0, 1}, 0, 0}, {{3, 7}, {0, 1}, 0, 1}}, true);
  const PackedChoices packed = pack_choices({}, choices, {{0, 1}});
  EXPECT_EQ(packed.batch.size(), 0);
  EXPECT_EQ(packed.batch.sequences(), 0);
  EXPECT_TRUE(packed.candidates.empty());
}

}  // namespace
}  // namespace safegrad
