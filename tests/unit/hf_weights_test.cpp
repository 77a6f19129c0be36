#include "models/hf_weights.h"

#include <cmath>
#include <random>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad::models {
namespace {

using nlohmann::json;
using test::expect_refused;
using test::TempFolder;
using test::tensor_of;
using test::TestTensor;
using test::write_tensors;
using test::write_text;

std::vector<float> random_floats(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(generator);
  return out;
}

TestTensor floats(const std::string& name, std::vector<int64_t> shape,
                  const std::vector<float>& values) {
  return tensor_of(name, Dtype::f32, std::move(shape), values);
}

std::vector<float> read(const WeightSource& source, const std::string& name, int64_t begin,
                        int64_t end) {
  std::vector<float> out(end - begin);
  source.read(name, begin, end, out.data());
  return out;
}

TEST(HfWeights, ReadsASingleFile) {
  const TempFolder folder;
  write_tensors(folder / "model.safetensors",
                {floats("a", {2, 2}, {1, 2, 3, 4}),
                 tensor_of("b", Dtype::bf16, {2}, std::vector<uint16_t>{0x3f80, 0xc000}),
                 tensor_of("c", Dtype::f16, {2}, std::vector<uint16_t>{0x3c00, 0x0001}),
                 tensor_of("ids", Dtype::i64, {1}, std::vector<int64_t>{3})});

  const HfWeights weights(folder.path());

  EXPECT_EQ(read(weights, "a", 1, 4), (std::vector<float>{2, 3, 4}));
  EXPECT_EQ(read(weights, "b", 0, 2), (std::vector<float>{1, -2}));
  EXPECT_EQ(read(weights, "c", 0, 2), (std::vector<float>{1, 0x1p-24f}));
  EXPECT_TRUE(weights.contains("a"));
  EXPECT_FALSE(weights.contains("z"));
  EXPECT_EQ(weights.shape("a"), (std::vector<int64_t>{2, 2}));
  weights.require("a", {2, 2});
  weights.require("b", {2});
}

TEST(HfWeights, ReadsIndexedShards) {
  const TempFolder folder;
  write_tensors(folder / "model-1.safetensors", {floats("a", {1}, {1}), floats("b", {1}, {2})});
  write_tensors(folder / "model-2.safetensors", {floats("c", {1}, {3}), floats("x", {1}, {9})});
  write_text(folder / "model.safetensors.index.json",
             R"({"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors",
                 "b": "model-1.safetensors", "c": "model-2.safetensors"}})");

  HfWeights first(folder.path());
  const HfWeights weights = std::move(first);

  EXPECT_EQ(read(weights, "a", 0, 1)[0], 1.0f);
  EXPECT_EQ(read(weights, "b", 0, 1)[0], 2.0f);
  EXPECT_EQ(read(weights, "c", 0, 1)[0], 3.0f);
  EXPECT_FALSE(weights.contains("x")) << "the index does not name it";
}

TEST(HfWeightsRefuses, FoldersWithoutWeights) {
  const TempFolder folder;
  expect_refused<ModelError>([&] { HfWeights weights(folder.path()); },
                             {folder.path(), "model.safetensors.index.json"});
  write_text(folder / "model.safetensors", "damaged");
  expect_refused<ModelError>([&] { HfWeights weights(folder.path()); },
                             {folder / "model.safetensors", "7 bytes"});
}

TEST(HfWeightsRefuses, MissingAndMismatchingTensors) {
  const TempFolder folder;
  write_tensors(folder / "model.safetensors",
                {floats("a", {2, 3}, std::vector<float>(6)),
                 tensor_of("ids", Dtype::i64, {1}, std::vector<int64_t>{3})});
  const HfWeights weights(folder.path());
  expect_refused<ModelError>([&] { weights.require("z\n", {1}); }, {folder.path(), "\"z\\x0a\""});
  expect_refused<ModelError>(
      [&] {
        weights.require("a", {3, 2});
      },
      {folder.path(), "\"a\"", "[2, 3]", "[3, 2]"});
  expect_refused<ModelError>([&] { weights.require("a", {6}); }, {"[2, 3]", "[6]"});
  expect_refused<ModelError>([&] { weights.require("ids", {1}); }, {"\"ids\" is I64", "BF16"});
  expect_refused<ModelError>([&] { read(weights, "ids", 0, 1); }, {folder.path(), "\"ids\""});
  expect_refused<ModelError>([&] { read(weights, "z", 0, 1); }, {folder.path(), "\"z\""});
  expect_refused<ModelError>([&] { weights.shape("z"); }, {"\"z\""});
  expect_refused<UsageError>([&] { read(weights, "a", 0, 7); }, {"[0, 7)"});
}

TEST(HfWeightsRefuses, BadIndexes) {
  const TempFolder folder;
  std::filesystem::create_directory(folder / "model");
  write_tensors(folder / "outside.safetensors", {floats("a", {1}, {1})});
  write_tensors(folder / "model/shard.safetensors", {floats("a", {1}, {1})});
  const std::string index = folder / "model/model.safetensors.index.json";
  const auto refused = [&](const std::string& text, std::vector<std::string> parts) {
    write_text(index, text);
    expect_refused<ModelError>([&] { HfWeights weights(folder / "model"); }, parts);
  };
  refused(R"({"weight_map": {"b": "shard.safetensors"}})", {"shard.safetensors", "\"b\""});
  refused(R"({"weight_map": {"a": "none.safetensors"}})", {"none.safetensors", "No such file"});
  for (const std::string file :
       {"../outside.safetensors", "./shard.safetensors", "/etc/x.safetensors", "..", "",
        "shard.bin", "shard.safetensors\\u0000.safetensors", "\\u0000.safetensors"}) {
    refused(R"({"weight_map": {"a": ")" + file + "\"}}", {index, "\"a\"", "same folder"});
  }
  refused(R"({"weight_map": {"a": 1}})", {index, "a: got 1"});
  refused(R"({"weight_map": []})", {index, "weight_map"});
  refused(R"({"weight_map": {}})", {index, "weight_map"});
  refused(R"({})", {index, "weight_map"});
  refused("{", {index, "not valid JSON"});
  write_text(index, R"({"weight_map": {"a": "shard.safetensors"}})");
  EXPECT_EQ(read(HfWeights(folder / "model"), "a", 0, 1)[0], 1.0f);
}

constexpr int64_t kOut = 5, kIn = 7, kRank = 3;
const std::string kModule = "model.layers.0.self_attn.q_proj";
const std::string kA = "base_model.model." + kModule + ".lora_A.weight";
const std::string kB = "base_model.model." + kModule + ".lora_B.weight";

/// A base model in "base" and an adapter in "adapter" that changes one of its two matrices.
class PeftAdapterTest : public testing::Test {
 protected:
  PeftAdapterTest() {
    std::filesystem::create_directory(folder_ / "base");
    std::filesystem::create_directory(folder_ / "adapter");
    write_tensors(folder_ / "base/model.safetensors", {floats(kModule + ".weight", {kOut, kIn}, w_),
                                                       floats("norm.weight", {3}, {1, 2, 3})});
    write_adapter({floats(kA, {kRank, kIn}, a_), floats(kB, {kOut, kRank}, b_)});
    write_config(config_);
  }
  void write_adapter(const std::vector<TestTensor>& tensors) {
    write_tensors(adapter() + "/adapter_model.safetensors", tensors);
  }
  void write_config(const json& config) {
    write_text(adapter() + "/adapter_config.json", config.dump());
  }
  std::string adapter() const { return folder_ / "adapter"; }
  MergedAdapterWeights open() const {
    return MergedAdapterWeights(adapter(), read_peft_adapter(adapter()));
  }
  void expect_adapter_refused(const std::vector<TestTensor>& tensors,
                              std::vector<std::string> parts) {
    write_adapter(tensors);
    parts.push_back(adapter() + "/adapter_model.safetensors");
    expect_refused<ModelError>([&] { open(); }, parts);
  }
  void expect_config_refused(const char* key, const json& value, std::vector<std::string> parts) {
    json config = config_;
    config[key] = value;
    write_config(config);
    parts.push_back(adapter() + "/adapter_config.json");
    parts.push_back(key);
    expect_refused<ModelError>([&] { read_peft_adapter(adapter()); }, parts);
  }

  TempFolder folder_;
  const std::vector<float> w_ = random_floats(kOut * kIn, 1), a_ = random_floats(kRank * kIn, 2),
                           b_ = random_floats(kOut * kRank, 3);
  const json config_ = {{"peft_type", "LORA"},
                        {"base_model_name_or_path", folder_ / "base"},
                        {"r", kRank},
                        {"lora_alpha", 5},
                        {"lora_dropout", 0.1},
                        {"bias", "none"},
                        {"use_dora", false},
                        {"use_rslora", false},
                        {"modules_to_save", nullptr},
                        {"rank_pattern", json::object()},
                        {"init_lora_weights", true},
                        {"target_modules", {"v_proj", "q_proj"}}};
};

TEST_F(PeftAdapterTest, ConfigIsRead) {
  EXPECT_TRUE(is_peft_adapter(adapter()));
  EXPECT_FALSE(is_peft_adapter(folder_ / "base"));
  const PeftAdapter read_back = read_peft_adapter(adapter());
  EXPECT_EQ(read_back.base_model, folder_ / "base");
  EXPECT_EQ(read_back.rank, kRank);
  EXPECT_EQ(read_back.alpha, 5.0);
  EXPECT_EQ(read_back.targets, (std::vector<std::string>{"q_proj", "v_proj"}));

  json expression = config_;
  expression["target_modules"] = ".*_proj";
  write_config(expression);
  EXPECT_EQ(read_peft_adapter(adapter()).targets, std::vector<std::string>{".*_proj"});
}

TEST_F(PeftAdapterTest, EveryRangeOfAMergedWeightEqualsTheDirectSum) {
  const MergedAdapterWeights merged = open();
  const std::string name = kModule + ".weight";
  const std::vector<float> whole = read(merged, name, 0, kOut * kIn);

  for (int64_t i = 0; i < kOut; ++i) {
    for (int64_t j = 0; j < kIn; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < kRank; ++r) sum += double{b_[i * kRank + r]} * a_[r * kIn + j];
      const double expected = w_[i * kIn + j] + 5.0 / kRank * sum;
      // Two roundings to float: of the change and of the sum.
      EXPECT_NEAR(whole[i * kIn + j], expected, 2e-7 * (1 + std::abs(expected)));
      EXPECT_NE(whole[i * kIn + j], w_[i * kIn + j]);
    }
  }
  for (int64_t begin = 0; begin <= kOut * kIn; ++begin) {
    for (int64_t end = begin; end <= kOut * kIn; ++end) {
      const auto part = read(merged, name, begin, end);
      ASSERT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + begin))
          << "[" << begin << ", " << end << ") has other bits than the whole";
    }
  }
}

TEST_F(PeftAdapterTest, OtherWeightsAreTheBases) {
  const MergedAdapterWeights merged = open();
  EXPECT_EQ(read(merged, "norm.weight", 1, 3), (std::vector<float>{2, 3}));
  merged.base().require("norm.weight", {3});
  expect_refused<ModelError>([&] { read(merged, "none", 0, 1); }, {"\"none\""});
  expect_refused<UsageError>([&] { read(merged, kModule + ".weight", 0, kOut * kIn + 1); }, {});
}

TEST_F(PeftAdapterTest, RelativeBasesAreFoundFromTheWorkingDirectoryThenTheAdapter) {
  json config = config_;
  config["base_model_name_or_path"] = "../base";
  write_config(config);
  EXPECT_EQ(read_peft_adapter(adapter()).base_model, adapter() + "/../base");
  EXPECT_EQ(read(open(), "norm.weight", 0, 1)[0], 1.0f);

  std::filesystem::create_directory(folder_ / "elsewhere");
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder_ / "elsewhere");
  EXPECT_EQ(read_peft_adapter(adapter()).base_model, "../base");
  std::filesystem::current_path(before);
}

TEST_F(PeftAdapterTest, RefusesABaseThatIsNowhere) {
  expect_config_refused("base_model_name_or_path", "Org/Name",
                        {"\"Org/Name\"", adapter() + "/Org/Name", "download"});
  expect_config_refused("base_model_name_or_path", nullptr, {"nothing"});
  expect_config_refused("base_model_name_or_path", "", {"path of a folder"});
  expect_config_refused("base_model_name_or_path", std::string("../base\0x", 9),
                        {"path of a folder"});
}

TEST_F(PeftAdapterTest, RefusesEverythingButPlainLora) {
  expect_config_refused("peft_type", "LOHA", {"got \"LOHA\"", "LORA"});
  expect_config_refused("bias", "all", {"got \"all\"", "none"});
  for (const char* key :
       {"use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "use_next_variant"}) {
    expect_config_refused(key, true, {"got true", "plain LoRA"});
  }
  expect_config_refused("modules_to_save", {"lm_head"}, {"plain LoRA"});
  expect_config_refused("rank_pattern", {{"q_proj", 4}}, {"plain LoRA"});
  expect_config_refused("alpha_pattern", {{"q_proj", 4}}, {"plain LoRA"});
  expect_config_refused("layer_replication", {{0, 1}}, {"plain LoRA"});
  expect_config_refused("target_parameters", {"w"}, {"plain LoRA"});
  expect_config_refused("trainable_token_indices", {1}, {"plain LoRA"});
  expect_config_refused("alora_invocation_tokens", {1}, {"plain LoRA"});
  expect_config_refused("init_lora_weights", "pissa_niter_4", {"pissa_niter_4", "gaussian"});
  expect_config_refused("r", 0, {"got 0"});
  expect_config_refused("lora_alpha", -1, {"got -1"});
  expect_config_refused("target_modules", nullptr, {"nothing"});
  write_text(adapter() + "/adapter_config.json", "{");
  expect_refused<ModelError>([&] { read_peft_adapter(adapter()); }, {"not valid JSON"});
}

TEST_F(PeftAdapterTest, RefusesAdaptersThatDoNotFitTheBase) {
  const TestTensor a = floats(kA, {kRank, kIn}, a_), b = floats(kB, {kOut, kRank}, b_);
  const auto shaped = [](const std::string& name, std::vector<int64_t> shape) {
    const auto n = shape[0] * shape[1];
    return floats(name, std::move(shape), std::vector<float>(n));
  };
  expect_adapter_refused({}, {"no tensors"});
  expect_adapter_refused({a}, {"no tensor \"" + kB + "\""});
  expect_adapter_refused({b}, {"\"" + kB + "\"", "not \"" + kA + "\""});
  expect_adapter_refused({shaped(kA, {kRank, kIn + 1}), b}, {"[3, 8]", "[5, 7]"});
  expect_adapter_refused({a, shaped(kB, {kOut + 1, kRank})}, {"[6, 3]", "[5, 7]"});
  expect_adapter_refused({shaped(kA, {kRank + 1, kIn}), shaped(kB, {kOut, kRank + 1})},
                         {"[4, 7]", "rank 3"});
  expect_adapter_refused({shaped(kA, {kIn, kRank}), shaped(kB, {kRank, kOut})}, {"[7, 3]"});
  expect_adapter_refused({shaped("base_model.model.other.lora_A.weight", {3, 7}),
                          shaped("base_model.model.other.lora_B.weight", {5, 3})},
                         {"\"other.weight\"", "base model lacks"});
  expect_adapter_refused({shaped("base_model.model.norm.lora_A.weight", {3, 7}),
                          shaped("base_model.model.norm.lora_B.weight", {5, 3})},
                         {"[3]"});
  for (const std::string name :
       {"x.lora_A.weight", "base_model.model..lora_A.weight", "base_model.model.lora_A.weight",
        "base_model.model.lm_head.weight", "base_model.model.x.lora_embedding_A"}) {
    expect_adapter_refused({a, b, shaped(name, {kRank, kIn})}, {"\"" + name + "\""});
  }
  expect_adapter_refused(
      {tensor_of(kA, Dtype::i32, {kRank, kIn}, std::vector<int32_t>(kRank * kIn)), b}, {"I32"});
  std::filesystem::remove(adapter() + "/adapter_model.safetensors");
  expect_refused<ModelError>([&] { open(); }, {"adapter_model.safetensors", "No such file"});
}

}  // namespace
}  // namespace safegrad::models
