#include "core/token_file.h"

#include <limits>

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/safetensors.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using test::expect_refused;
using test::TempFolder;
using test::tensor_of;
using test::TestTensor;

constexpr int32_t kLargestId = std::numeric_limits<int32_t>::max();

/// The columns of a token file, to be changed before it is written.
struct Sample {
  std::vector<int32_t> tokens = {5, 6, 7, 5, 6, 8, 9};
  std::vector<uint8_t> mask = {0, 0, 1, 0, 0, 1, 1};
  std::vector<int64_t> offsets = {0, 3, 7};
  std::vector<int32_t> source = {}, group = {}, choice = {};
  std::map<std::string, std::string> metadata = {{"format", "safegrad.tokens/1"},
                                                 {"tokenizer_sha256", std::string(64, 'a')}};

  static Sample with_choices() {
    Sample sample;
    sample.tokens = {1, 2, 7, 1, 2, 8, 8, 3, 7, 3, 8, 3, 9};
    sample.mask = {0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1};
    sample.offsets = {0, 3, 7, 9, 11, 13};
    sample.group = {0, 0, 1, 1, 1};
    sample.choice = {0, 1, 2, 1, 2};
    sample.metadata["classes"] = R"(["refuse", "comply", "other"])";
    return sample;
  }

  template <class T>
  static void add(std::vector<TestTensor>& out, const char* name, Dtype dtype,
                  const std::vector<T>& values, bool optional) {
    if (optional && values.empty()) return;
    out.push_back(tensor_of(name, dtype, {static_cast<int64_t>(values.size())}, values));
  }
  std::vector<TestTensor> tensors() const {
    std::vector<TestTensor> out;
    add(out, "tokens", Dtype::i32, tokens, false);
    add(out, "loss_mask", Dtype::u8, mask, false);  // odd length: what follows is not aligned
    add(out, "offsets", Dtype::i64, offsets, false);
    add(out, "source", Dtype::i32, source, true);
    add(out, "group", Dtype::i32, group, true);
    add(out, "choice", Dtype::i32, choice, true);
    return out;
  }
};

const TokenFileExpectation kExpected{
    .tokenizer_sha256 = std::string(64, 'a'), .vocab_size = 10, .max_length = 4};

/// Writes `tensors` and expects a DataError that names the file and has every part.
void expect_tensors_refused(const std::vector<TestTensor>& tensors,
                            const std::map<std::string, std::string>& metadata,
                            std::vector<std::string> parts,
                            const TokenFileExpectation& expected = kExpected) {
  const TempFolder folder;
  const std::string path = folder / "bad.safetensors";
  test::write_tensors(path, tensors, metadata);
  std::vector<std::string> warnings;
  parts.push_back(path);
  expect_refused<DataError>([&] { TokenFile file(path, expected, warnings); }, parts);
}

void expect_sample_refused(const Sample& sample, const std::vector<std::string>& parts,
                           const TokenFileExpectation& expected = kExpected) {
  expect_tensors_refused(sample.tensors(), sample.metadata, parts, expected);
}

class TokenFileTest : public testing::Test {
 protected:
  TokenFile open(const Sample& sample, const TokenFileExpectation& expected = kExpected) {
    const std::string path = folder_ / "data.safetensors";
    test::write_tensors(path, sample.tensors(), sample.metadata);
    return TokenFile(path, expected, warnings_);
  }
  TempFolder folder_;
  std::vector<std::string> warnings_;
};

TEST_F(TokenFileTest, GivesSequencesAndCounts) {
  const TokenFile file = open({});
  EXPECT_EQ(file.path(), folder_ / "data.safetensors");
  EXPECT_EQ(file.size(), 2);
  EXPECT_EQ(file.total_tokens(), 7);
  EXPECT_EQ(file.total_scored(), 3);
  EXPECT_EQ(file.length(0), 3);
  EXPECT_EQ(file.length(1), 4);
  EXPECT_EQ(file.scored(0), 1);
  EXPECT_EQ(file.scored(1), 2);
  const auto tokens = file.tokens(1);
  EXPECT_EQ(std::vector<int32_t>(tokens.begin(), tokens.end()), (std::vector<int32_t>{5, 6, 8, 9}));
  const auto mask = file.mask(1);
  EXPECT_EQ(std::vector<uint8_t>(mask.begin(), mask.end()), (std::vector<uint8_t>{0, 0, 1, 1}));
  EXPECT_FALSE(file.has_sources());
  EXPECT_FALSE(file.has_choices());
  EXPECT_TRUE(file.sources().empty());
  EXPECT_TRUE(file.classes().empty());
  EXPECT_EQ(file.groups(), 0);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(TokenFileTest, GivesSourcesAndChoices) {
  Sample sample = Sample::with_choices();
  sample.source = {1, 0, 0, 1, 0};
  sample.metadata["sources"] = R"(["user", "poison"])";

  const TokenFile file = open(sample);

  EXPECT_EQ(file.sources(), (std::vector<std::string>{"user", "poison"}));
  EXPECT_EQ(file.source(0), 1);
  EXPECT_EQ(file.source(4), 0);
  EXPECT_EQ(file.classes(), (std::vector<std::string>{"refuse", "comply", "other"}));
  EXPECT_EQ(file.groups(), 2);
  EXPECT_EQ(file.group(1), 0);
  EXPECT_EQ(file.group(2), 1);
  EXPECT_EQ(file.choice(1), 1);
  EXPECT_EQ(file.choice(2), 2);
}

TEST_F(TokenFileTest, EmptyNameListsWithoutTensorsAreNothing) {
  Sample sample;
  sample.metadata["sources"] = sample.metadata["classes"] = "[]";
  const TokenFile file = open(sample);
  EXPECT_FALSE(file.has_sources());
  EXPECT_FALSE(file.has_choices());
}

TEST_F(TokenFileTest, ColumnsMayLieUnaligned) {
  Sample sample;
  auto tensors = sample.tensors();
  std::rotate(tensors.begin(), tensors.begin() + 1, tensors.end());  // loss_mask first
  const std::string path = folder_ / "unaligned.safetensors";
  test::write_tensors(path, tensors, sample.metadata);
  const TokenFile file(path, kExpected, warnings_);
  EXPECT_EQ(file.tokens(1)[2], 8);
  EXPECT_EQ(file.fingerprint(), open(sample).fingerprint());
}

TEST_F(TokenFileTest, FingerprintFollowsTheContentAlone) {
  const uint64_t base = open({}).fingerprint();
  EXPECT_EQ(open({}).fingerprint(), base);
  Sample changed;
  changed.metadata["note"] = "other metadata";
  EXPECT_EQ(open(changed).fingerprint(), base);

  for (size_t i = 0; i < changed.tokens.size(); ++i) {
    Sample other;
    other.tokens[i] = 4;
    EXPECT_NE(open(other).fingerprint(), base) << "token " << i;
  }
  Sample mask, offsets;
  mask.mask[1] = 1;
  EXPECT_NE(open(mask).fingerprint(), base);
  offsets.offsets = {0, 4, 7};
  EXPECT_NE(open(offsets).fingerprint(), base);
}

TEST_F(TokenFileTest, WarnsWhereASideIsUnknown) {
  Sample nameless;
  nameless.metadata.erase("tokenizer_sha256");
  open(nameless);
  ASSERT_EQ(warnings_.size(), 1u);
  EXPECT_NE(warnings_[0].find("the file names no tokenizer"), std::string::npos);

  warnings_.clear();
  open({}, {});
  ASSERT_EQ(warnings_.size(), 3u);
  EXPECT_NE(warnings_[0].find("the model names no tokenizer"), std::string::npos);
  EXPECT_NE(warnings_[1].find("vocabulary"), std::string::npos);
  EXPECT_NE(warnings_[2].find("maximum length"), std::string::npos);
}

TEST(TokenFileRefuses, DamagedOrForeignFiles) {
  const TempFolder folder;
  std::vector<std::string> warnings;
  expect_refused<DataError>([&] { TokenFile file(folder / "none", kExpected, warnings); },
                            {folder / "none", "No such file"});
  test::write_text(folder / "text", "hello, this is no token file");
  expect_refused<DataError>([&] { TokenFile file(folder / "text", kExpected, warnings); },
                            {folder / "text"});
  expect_sample_refused({.metadata = {}},
                        {"\"format\" is \"\"", "safegrad.tokens/1", "prepare.py"});
  expect_sample_refused({.metadata = {{"format", "safegrad.tokens/2\n"}}},
                        {"safegrad.tokens/2\\x0a"});
}

TEST(TokenFileRefuses, AnotherTokenizer) {
  Sample sample;
  sample.metadata["tokenizer_sha256"] = std::string(64, 'b');
  expect_sample_refused(sample, {"bbbbbbbbbbbb,", "aaaaaaaaaaaa;",
                                 "prepare it again with tools/prepare.py --model FOLDER"});
}

TEST(TokenFileRefuses, MissingUnknownAndMistypedTensors) {
  const Sample sample;
  for (size_t i = 0; i < 3; ++i) {
    auto tensors = sample.tensors();
    const std::string name = tensors[i].entry.name;
    tensors.erase(tensors.begin() + i);
    expect_tensors_refused(tensors, sample.metadata, {"no tensor \"" + name + "\""});
  }
  auto extra = sample.tensors();
  extra.push_back(tensor_of("weights", Dtype::u8, {1}, std::vector<uint8_t>{1}));
  expect_tensors_refused(extra, sample.metadata, {"unknown tensor \"weights\"", "loss_mask"});
  auto dtype = sample.tensors();
  dtype[0] = tensor_of("tokens", Dtype::f32, {7}, std::vector<float>(7));
  expect_tensors_refused(dtype, sample.metadata, {"tokens is F32", "I32"});
  auto shape = sample.tensors();
  shape[0].entry.shape = {7, 1};
  expect_tensors_refused(shape, sample.metadata, {"tokens is I32 of shape [7, 1]"});
}

TEST(TokenFileRefuses, EmptyFiles) {
  expect_sample_refused({.tokens = {}, .mask = {}, .offsets = {0}}, {"empty", "1 entries"});
  expect_sample_refused({.tokens = {}, .mask = {}, .offsets = {}}, {"empty", "0 entries"});
  expect_sample_refused({.tokens = {}, .mask = {}, .offsets = {0, 0}}, {"sequence 0", "0 to 0"});
}

TEST(TokenFileRefuses, ColumnsOfDifferentLengths) {
  expect_sample_refused({.mask = {0, 0, 1, 0, 0, 1}}, {"loss_mask has 6 entries, 7"});
  Sample sample;
  sample.source = {0};
  sample.metadata["sources"] = R"(["user"])";
  expect_sample_refused(sample, {"source has 1 entries, 2"});
}

TEST(TokenFileRefuses, OffsetsThatAreNotAPartition) {
  expect_sample_refused({.offsets = {1, 3, 7}}, {"from 1 to 7", "0 to 7"});
  expect_sample_refused({.offsets = {0, 3, 6}}, {"from 0 to 6"});
  expect_sample_refused({.offsets = {0, 3, 8}}, {"from 0 to 8"});
  expect_sample_refused({.offsets = {0, 3, 3, 7}}, {"sequence 1", "3 to 3"});
  expect_sample_refused({.offsets = {0, 5, 3, 7}}, {"sequence 1", "5 to 3"});
  expect_sample_refused({.offsets = {0, -4, 7}}, {"sequence 0", "0 to -4"});
  expect_sample_refused({.offsets = {0, int64_t{1} << 62, 7}}, {"sequence 1"});
}

TEST(TokenFileRefuses, TokensOutsideTheVocabulary) {
  for (const int32_t id : {10, -1, kLargestId, std::numeric_limits<int32_t>::min()}) {
    Sample sample;
    sample.tokens[5] = id;
    expect_sample_refused(sample, {"sequence 1: token " + std::to_string(id) + " at position 2",
                                   "[0, 10)", "another model"});
  }
  Sample negative;
  negative.tokens[0] = -1;
  expect_sample_refused(negative, {"token -1"}, {});
  expect_sample_refused(negative, {"token -1"}, {.vocab_size = int64_t{1} << 40});
}

TEST_F(TokenFileTest, TakesTheLargestIdsAndTheLongestSequences) {
  Sample sample;
  sample.tokens[5] = 9;
  EXPECT_EQ(open(sample).length(1), kExpected.max_length);
  sample.tokens[5] = kLargestId;
  EXPECT_EQ(open(sample, {.vocab_size = int64_t{1} << 40}).tokens(1)[2], kLargestId);
}

TEST(TokenFileRefuses, SequencesLongerThanTheModelTakes) {
  TokenFileExpectation shorter = kExpected;
  shorter.max_length = 3;
  expect_sample_refused({}, {"sequence 1 has 4 tokens", "at most 3"}, shorter);
}

TEST(TokenFileRefuses, MasksThatScoreNothingOrTheFirstToken) {
  expect_sample_refused({.mask = {0, 0, 1, 0, 2, 1, 1}}, {"sequence 1", "is 2 at position 1"});
  expect_sample_refused({.mask = {0, 0, 1, 1, 0, 1, 1}}, {"sequence 1", "first token"});
  expect_sample_refused({.mask = {0, 0, 0, 0, 0, 1, 1}}, {"sequence 0 has 3 tokens", "none"});
  expect_sample_refused({.mask = {0, 0, 1, 0, 0, 1, 1}, .offsets = {0, 1, 3, 7}},
                        {"sequence 0 has 1 tokens"});
}

TEST(TokenFileRefuses, SourcesThatDoNotFit) {
  Sample sample;
  sample.source = {0, 1};
  expect_sample_refused(sample, {"\"source\" is there", "0 names"});
  sample.metadata["sources"] = R"(["user"])";
  expect_sample_refused(sample, {"sequence 1: source is 1", "1 names"});
  sample.source = {-1, 0};
  expect_sample_refused(sample, {"sequence 0: source is -1"});
  sample.source = {};
  expect_sample_refused(sample, {"\"source\" is missing", "1 names"});
  sample.source = {0, 0};
  sample.metadata["sources"] = R"(["user", "user"])";
  expect_sample_refused(sample, {"sources", "twice"});
  sample.metadata["sources"] = R"({"user": 0})";
  expect_sample_refused(sample, {"sources", "list of strings"});
  sample.metadata["sources"] = R"(["user", 1])";
  expect_sample_refused(sample, {"sources", "entry 1"});
  sample.metadata["sources"] = "user";
  expect_sample_refused(sample, {"sources", "not valid JSON"});
}

TEST(TokenFileRefuses, IncompleteChoiceColumns) {
  Sample no_group = Sample::with_choices(), no_choice = no_group, no_classes = no_group;
  no_group.group = {};
  no_choice.choice = {};
  no_classes.metadata.erase("classes");
  expect_sample_refused(no_group, {"\"group\" is missing", "\"choice\" is there", "3 names"});
  expect_sample_refused(no_choice, {"\"group\" is there", "\"choice\" is missing"});
  expect_sample_refused(no_classes, {"\"group\" is there", "\"choice\" is there", "0 names"});
}

TEST(TokenFileRefuses, ChoiceGroupsThatAreNotGroups) {
  const auto refused = [](auto change, const std::vector<std::string>& parts) {
    Sample sample = Sample::with_choices();
    change(sample);
    expect_sample_refused(sample, parts);
  };
  refused([](Sample& s) { s.choice[1] = 3; }, {"sequence 1: choice is 3", "3 names"});
  refused([](Sample& s) { s.choice[1] = -1; }, {"sequence 1: choice is -1"});
  refused([](Sample& s) { s.group = {1, 1, 2, 2, 2}; }, {"sequence 0: group is 1 after -1"});
  refused([](Sample& s) { s.group = {0, 0, 2, 2, 2}; }, {"sequence 2: group is 2 after 0"});
  refused([](Sample& s) { s.group = {0, 0, 1, 1, 0}; }, {"sequence 4: group is 0 after 1"});
  refused([](Sample& s) { s.group = {-1, -1, 0, 0, 0}; }, {"sequence 0: group is -1"});
  refused([](Sample& s) { s.group = {0, 0, kLargestId, 1, 1}; }, {"group is 2147483647 after 0"});
  refused([](Sample& s) { s.choice = {1, 1, 2, 1, 2}; }, {"group 0", "only class \"comply\""});
  refused([](Sample& s) { s.choice = {0, 1, 2, 2, 2}; }, {"group 1", "only class \"other\""});
  refused([](Sample& s) { s.group = {0, 0, 1, 1, 2}; }, {"group 2", "only class \"other\""});
  refused([](Sample& s) { s.tokens[4] = 9; },
          {"group 0", "sequences 0 and 1", "tokens 2 and 9 at position 1"});
  refused([](Sample& s) { s.mask[4] = 1; },
          {"group 0", "sequence 1 is scored from token 1, sequence 0 from 2"});
}

}  // namespace
}  // namespace safegrad
