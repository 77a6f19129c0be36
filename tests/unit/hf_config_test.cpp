#include "models/hf_config.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad::models {
namespace {

using nlohmann::json;
using test::expect_refused;
using test::TempFolder;

json llama() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "rope_scaling": null, "hidden_act": "silu", "tie_word_embeddings": true,
    "attention_bias": false, "mlp_bias": false, "sliding_window": null})");
}

json of(const char* architecture) {
  json config = llama();
  config["architectures"] = {architecture};
  return config;
}

json llama3_scaling() {
  return {{"rope_type", "llama3"},
          {"factor", 32.0},
          {"low_freq_factor", 1.0},
          {"high_freq_factor", 4.0},
          {"original_max_position_embeddings", 8192}};
}

DecoderConfig read(const json& config) {
  const TempFolder folder;
  test::write_text(folder / "config.json", config.dump());
  return read_decoder_config(folder / "config.json");
}

void expect_text_refused(const std::string& text, std::vector<std::string> parts) {
  const TempFolder folder;
  const std::string path = folder / "config.json";
  test::write_text(path, text);
  parts.push_back(path);
  expect_refused<ModelError>([&] { read_decoder_config(path); }, parts);
}

/// The Llama config with one key changed is refused with that key and `parts`.
void expect_refused_with(const char* key, const json& value, std::vector<std::string> parts) {
  json config = llama();
  config[key] = value;
  parts.push_back(key);
  expect_text_refused(config.dump(), parts);
}

TEST(HfConfig, ReadsEveryKeyOfALlama) {
  const DecoderConfig config = read(llama());
  EXPECT_EQ(config.architecture, "LlamaForCausalLM");
  EXPECT_EQ(config.vocab_size, 49152);
  EXPECT_EQ(config.hidden_size, 576);
  EXPECT_EQ(config.intermediate_size, 1536);
  EXPECT_EQ(config.layers, 30);
  EXPECT_EQ(config.heads, 9);
  EXPECT_EQ(config.kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.max_positions, 8192);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.rope_theta, 100000.0);
  EXPECT_FALSE(config.rope_scaling);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_FALSE(config.o_bias);
  EXPECT_FALSE(config.mlp_bias);
  EXPECT_FALSE(config.qk_norm);
}

TEST(HfConfig, AbsentAndNullKeysHaveTheDefaultsOfTransformers) {
  for (const bool absent : {true, false}) {
    json config = llama();
    for (const char* key :
         {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
          "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"}) {
      if (absent) {
        config.erase(key);
      } else {
        config[key] = nullptr;
      }
    }
    const DecoderConfig read_back = read(config);
    EXPECT_EQ(read_back.kv_heads, 9);
    EXPECT_EQ(read_back.head_dim, 64);  // 576 / 9
    EXPECT_EQ(read_back.rms_norm_eps, 1e-6);
    EXPECT_EQ(read_back.rope_theta, 10000.0);
    EXPECT_FALSE(read_back.tied_embeddings);
  }
  json qwen3 = of("Qwen3ForCausalLM");
  qwen3.erase("head_dim");
  EXPECT_EQ(read(qwen3).head_dim, 128);
}

TEST(HfConfig, BiasesAndNormsFollowTheFamily) {
  json config = llama();
  config["attention_bias"] = config["mlp_bias"] = true;
  const DecoderConfig biased = read(config);
  EXPECT_TRUE(biased.qkv_bias && biased.o_bias && biased.mlp_bias);
  EXPECT_FALSE(biased.qk_norm);

  const DecoderConfig qwen2 = read(of("Qwen2ForCausalLM"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias || qwen2.mlp_bias || qwen2.qk_norm);

  const DecoderConfig qwen3 = read(of("Qwen3ForCausalLM"));
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_FALSE(qwen3.qkv_bias || qwen3.o_bias || qwen3.mlp_bias);
  config["architectures"] = {"Qwen3ForCausalLM"};
  const DecoderConfig qwen3_biased = read(config);
  EXPECT_TRUE(qwen3_biased.qkv_bias && qwen3_biased.o_bias);
}

TEST(HfConfig, ReadsLlama3ScalingUnderEachSpelling) {
  json old_spelling = llama3_scaling();
  old_spelling["type"] = old_spelling["rope_type"];
  old_spelling.erase("rope_type");
  json both = llama3_scaling();
  both["type"] = "llama3";
  for (const json& scaling : {llama3_scaling(), old_spelling, both}) {
    json config = llama();
    config["rope_scaling"] = scaling;
    const auto read_back = read(config).rope_scaling;
    ASSERT_TRUE(read_back);
    EXPECT_EQ(read_back->factor, 32.0);
    EXPECT_EQ(read_back->low_freq_factor, 1.0);
    EXPECT_EQ(read_back->high_freq_factor, 4.0);
    EXPECT_EQ(read_back->original_max_position_embeddings, 8192);
  }
}

TEST(HfConfig, ReadsThetaInsideRopeParameters) {
  json config = llama();
  config.erase("rope_theta");
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  EXPECT_EQ(read(config).rope_theta, 5e5);
  EXPECT_FALSE(read(config).rope_scaling);

  config["rope_parameters"] = llama3_scaling();
  config["rope_parameters"]["rope_theta"] = 500000;
  EXPECT_EQ(read(config).rope_theta, 5e5);
  EXPECT_TRUE(read(config).rope_scaling);
  config["rope_theta"] = 5e5;
  config["rope_scaling"] = config["rope_parameters"];
  EXPECT_EQ(read(config).rope_theta, 5e5);
}

TEST(HfConfig, AcceptsDefaultScalingAndFullAttention) {
  json config = of("Qwen2ForCausalLM");
  config["rope_scaling"] = {{"type", "default"}};
  config["use_sliding_window"] = false;
  config["sliding_window"] = 4096;
  config["layer_types"] = {"full_attention", "full_attention"};
  EXPECT_FALSE(read(config).rope_scaling);
}

TEST(HfConfigRefuses, FilesThatAreNotConfigs) {
  const TempFolder folder;
  expect_refused<ModelError>([&] { read_decoder_config(folder / "config.json"); },
                             {folder / "config.json", "No such file"});
  expect_refused<ModelError>([&] { read_decoder_config(folder.path()); }, {"a folder"});
  expect_text_refused("", {"not valid JSON"});
  expect_text_refused("[1]", {"JSON object is expected"});
  expect_text_refused(R"({"vocab_size": 1, "vocab_size": 2})", {"\"vocab_size\" appears twice"});
  expect_text_refused(std::string((16 << 20) + 1, ' '), {"16777217 bytes", "16777216"});
}

TEST(HfConfigRefuses, OtherArchitectures) {
  const std::string allowed = "Qwen3ForCausalLM";
  expect_refused_with("architectures", json::array(), {allowed});
  expect_refused_with("architectures", nullptr, {allowed, "nothing"});
  expect_refused_with("architectures", "LlamaForCausalLM", {"list of strings"});
  expect_refused_with("architectures", {1}, {"entry 0"});
  expect_refused_with("architectures", {"GPT2LMHead\nModel", "LlamaForCausalLM"},
                      {"GPT2LMHead\\x0aModel", allowed});
}

TEST(HfConfigRefuses, SizesThatAreMissingMistypedOrOutOfRange) {
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "max_position_embeddings"}) {
    expect_refused_with(key, nullptr, {"got nothing", "from 1 to"});
    expect_refused_with(key, 0, {"got 0"});
    expect_refused_with(key, -5, {"got -5"});
    expect_refused_with(key, 64.0, {"got 64.0"});
    expect_refused_with(key, "64", {"got \"64\""});
    expect_refused_with(key, int64_t{1} << 40, {"got 1099511627776"});
    expect_refused_with(key, ~uint64_t{0}, {"got 18446744073709551615"});
  }
  json qwen2 = of("Qwen2ForCausalLM");
  qwen2.erase("num_key_value_heads");
  expect_text_refused(qwen2.dump(), {"num_key_value_heads", "nothing"});
}

TEST(HfConfigRefuses, SizesThatContradictEachOther) {
  expect_refused_with("num_key_value_heads", 2, {"num_attention_heads 9", "heads 2"});
  expect_refused_with("head_dim", 63, {"63", "even"});
  json config = llama();
  config.erase("head_dim");
  config["hidden_size"] = 577;
  expect_text_refused(config.dump(), {"hidden_size 577", "num_attention_heads 9"});
  config["hidden_size"] = 567;
  expect_text_refused(config.dump(), {"head_dim 63"});
}

TEST(HfConfigRefuses, NumbersThatCannotBe) {
  expect_refused_with("rms_norm_eps", 0, {"above 0"});
  expect_refused_with("rms_norm_eps", "1e-5", {"above 0"});
  expect_refused_with("rope_theta", -1.0, {"above 0"});
  expect_refused_with("tie_word_embeddings", 1, {"true or false"});
  expect_refused_with("attention_bias", "no", {"true or false"});
}

TEST(HfConfigRefuses, WhatTheDecoderDoesNotCompute) {
  expect_refused_with("hidden_act", "gelu", {"got \"gelu\"", "silu"});
  expect_refused_with("use_sliding_window", true, {"got true", "false"});
  expect_refused_with("layer_types", {"full_attention", "sliding_attention"},
                      {"sliding_attention"});
  expect_refused_with("partial_rotary_factor", 0.5, {"got 0.5"});
}

TEST(HfConfigRefuses, RopeScalingItDoesNotUnderstand) {
  const auto scaled = [](auto change) {
    json scaling = llama3_scaling();
    change(scaling);
    return scaling;
  };
  const char* key = "rope_scaling";
  expect_refused_with(key, {{"rope_type", "yarn"}, {"factor", 4.0}},
                      {"rope_type: got \"yarn\"", "llama3"});
  expect_refused_with(key, {{"type", "linear"}, {"factor", 2.0}}, {"type: got \"linear\""});
  expect_refused_with(key, {{"factor", 2.0}}, {"factor: got 2.0"});
  expect_refused_with(key, "llama3", {"JSON object"});
  expect_refused_with(key, scaled([](json& s) { s["type"] = "default"; }),
                      {"type: got \"default\"", "same as rope_type"});
  expect_refused_with(key, scaled([](json& s) { s.erase("factor"); }), {"factor: got nothing"});
  expect_refused_with(key, scaled([](json& s) { s["factor"] = 0.5; }), {"factor: got 0.5"});
  expect_refused_with(key, scaled([](json& s) { s["high_freq_factor"] = 1.0; }),
                      {"high_freq_factor: got 1.0", "low_freq_factor (1)"});
  expect_refused_with(key, scaled([](json& s) { s["beta_fast"] = 1.0; }), {"beta_fast"});
  expect_refused_with(key, scaled([](json& s) { s["rope_theta"] = 7.0; }),
                      {"rope_theta: got 7.0", "100000"});
  expect_refused_with(key, scaled([](json& s) { s["original_max_position_embeddings"] = 0; }),
                      {"original_max_position_embeddings: got 0"});
  json config = llama();
  config["rope_scaling"] = llama3_scaling();
  config["rope_parameters"] = {{"rope_type", "default"}};
  expect_text_refused(config.dump(), {"rope_parameters and rope_scaling"});
}

}  // namespace
}  // namespace safegrad::models
