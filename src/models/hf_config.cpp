#include "models/hf_config.h"

#include <array>
#include <set>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"

namespace safegrad::models {
namespace {

using nlohmann::json;

constexpr int64_t kMaxConfigBytes = 16 << 20;
// Bounds on what a file can make the program reserve; every product of two of them fits int64.
constexpr int64_t kMaxIndex = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxWidth = 1 << 24;
constexpr int64_t kMaxHeads = 1 << 16;
constexpr int64_t kMaxLayers = 10'000;

enum class Family { llama, qwen2, qwen3 };
constexpr std::array<std::pair<std::string_view, Family>, 3> kArchitectures = {{
    {"LlamaForCausalLM", Family::llama},
    {"Qwen2ForCausalLM", Family::qwen2},
    {"Qwen3ForCausalLM", Family::qwen3},
}};
constexpr const char* kAllowedArchitectures =
    "[\"LlamaForCausalLM\"], [\"Qwen2ForCausalLM\"] or [\"Qwen3ForCausalLM\"]";

Family read_architecture(const JsonObject& root, const std::string& path, std::string& name) {
  const json* value = root.find("architectures");
  if (value == nullptr) root.refuse("architectures", kAllowedArchitectures);
  const auto list = string_list(*value, path + ": architectures");
  if (list.empty()) root.refuse("architectures", kAllowedArchitectures);
  name = list.front();
  for (const auto& [known, family] : kArchitectures) {
    if (name == known) return family;
  }
  throw ModelError(fmt::format("{}: architectures: got \"{}\"; allowed: {}", path, printable(name),
                               kAllowedArchitectures));
}

void read_sizes(const JsonObject& root, const std::string& path, Family family,
                DecoderConfig& config) {
  config.vocab_size = root.integer("vocab_size", 1, kMaxIndex);
  config.hidden_size = root.integer("hidden_size", 1, kMaxWidth);
  config.intermediate_size = root.integer("intermediate_size", 1, kMaxWidth);
  config.layers = root.integer("num_hidden_layers", 1, kMaxLayers);
  config.heads = root.integer("num_attention_heads", 1, kMaxHeads);
  // transformers gives Qwen configs without this key 32 groups; asking for it avoids the surprise.
  std::optional<int64_t> kv_default;
  if (family == Family::llama) kv_default = config.heads;
  config.kv_heads = root.integer("num_key_value_heads", 1, kMaxHeads, kv_default);
  config.max_positions = root.integer("max_position_embeddings", 1, kMaxIndex);
  SAFEGRAD_CHECK(config.heads % config.kv_heads == 0, ModelError,
                 "{}: num_attention_heads {} must be a multiple of num_key_value_heads {}", path,
                 config.heads, config.kv_heads);

  if (root.find("head_dim") != nullptr) {
    config.head_dim = root.integer("head_dim", 1, kMaxHeads);
  } else if (family == Family::qwen3) {
    config.head_dim = 128;  // transformers' default for this family, whatever the width
  } else {
    SAFEGRAD_CHECK(config.hidden_size % config.heads == 0, ModelError,
                   "{}: hidden_size {} must be a multiple of num_attention_heads {}, or head_dim "
                   "must be given",
                   path, config.hidden_size, config.heads);
    config.head_dim = config.hidden_size / config.heads;
  }
  SAFEGRAD_CHECK(
      config.head_dim % 2 == 0, ModelError,
      "{}: head_dim {} (given, or hidden_size {} / num_attention_heads {}) must be even: "
      "rotary embeddings turn pairs",
      path, config.head_dim, config.hidden_size, config.heads);
}

/// "rope_type", or "type" as older files spell it.
std::string read_rope_type(const JsonObject& rope) {
  const std::string type = rope.string("rope_type", rope.string("type", "default"));
  if (rope.string("type", type) != type) rope.refuse("type", "the same as rope_type");
  if (type != "default" && type != "llama3") {
    rope.refuse(rope.find("rope_type") ? "rope_type" : "type", "\"default\" or \"llama3\"");
  }
  return type;
}

Llama3RopeScaling read_llama3_scaling(const JsonObject& rope) {
  const Llama3RopeScaling scaling{.factor = rope.positive("factor"),
                                  .low_freq_factor = rope.positive("low_freq_factor"),
                                  .high_freq_factor = rope.positive("high_freq_factor"),
                                  .original_max_position_embeddings = rope.integer(
                                      "original_max_position_embeddings", 1, kMaxIndex)};
  if (scaling.factor < 1) rope.refuse("factor", "a number from 1");
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    rope.refuse("high_freq_factor",
                fmt::format("a number above low_freq_factor ({})", scaling.low_freq_factor));
  }
  return scaling;
}

void check_whole_rotation(const JsonObject& object) {
  if (object.positive("partial_rotary_factor", 1.0) != 1.0) {
    object.refuse("partial_rotary_factor", "1 (every dimension of a head is rotated)");
  }
}

void read_rope(const JsonObject& root, const std::string& path, DecoderConfig& config) {
  check_whole_rotation(root);
  config.rope_theta = root.positive("rope_theta", config.rope_theta);
  const json* parameters = root.find("rope_parameters");
  const json* scaling = root.find("rope_scaling");
  SAFEGRAD_CHECK(parameters == nullptr || scaling == nullptr || *parameters == *scaling, ModelError,
                 "{}: rope_parameters and rope_scaling are both given and differ; remove one",
                 path);
  const json* const value = parameters != nullptr ? parameters : scaling;
  if (value == nullptr) return;

  const JsonObject rope(*value,
                        path + (parameters != nullptr ? ": rope_parameters" : ": rope_scaling"));
  const bool llama3 = read_rope_type(rope) == "llama3";
  std::set<std::string> allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor"};
  if (llama3) {
    allowed.insert(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"});
  }
  // A scaling that is not understood must not be read as no scaling.
  for (const auto& item : value->items()) {
    if (!item.value().is_null() && !allowed.contains(item.key())) {
      rope.refuse(item.key(), fmt::format("{}", fmt::join(allowed, ", ")));
    }
  }
  check_whole_rotation(rope);
  const double theta = rope.positive("rope_theta", config.rope_theta);
  if (root.find("rope_theta") != nullptr && theta != config.rope_theta) {
    rope.refuse("rope_theta", fmt::format("{}, as at the top level", config.rope_theta));
  }
  config.rope_theta = theta;
  if (llama3) config.rope_scaling = read_llama3_scaling(rope);
}

/// Attention is full and causal here, so a model that was made with a window is another model.
void check_full_attention(const JsonObject& root, const std::string& path) {
  if (root.boolean("use_sliding_window", false)) root.refuse("use_sliding_window", "false");
  const json* types = root.find("layer_types");
  if (types == nullptr) return;
  for (const std::string& type : string_list(*types, path + ": layer_types")) {
    SAFEGRAD_CHECK(type == "full_attention", ModelError,
                   "{}: layer_types: got \"{}\"; allowed: \"full_attention\"", path,
                   printable(type));
  }
}

DecoderConfig read_config(const std::string& path) {
  const json document = parse_json(read_small_file(path, kMaxConfigBytes), path);
  const JsonObject root(document, path);
  DecoderConfig config;
  const Family family = read_architecture(root, path, config.architecture);
  read_sizes(root, path, family, config);
  config.rms_norm_eps = root.positive("rms_norm_eps", config.rms_norm_eps);
  read_rope(root, path, config);
  check_full_attention(root, path);
  if (root.string("hidden_act", "silu") != "silu") root.refuse("hidden_act", "\"silu\"");

  config.tied_embeddings = root.boolean("tie_word_embeddings", false);
  const bool attention_bias = root.boolean("attention_bias", false);
  config.qkv_bias = family == Family::qwen2 || attention_bias;
  config.o_bias = family != Family::qwen2 && attention_bias;
  config.mlp_bias = family == Family::llama && root.boolean("mlp_bias", false);
  config.qk_norm = family == Family::qwen3;
  return config;
}

}  // namespace

DecoderConfig read_decoder_config(const std::string& config_json_path) {
  return rethrow_as<ModelError>([&] { return read_config(config_json_path); });
}

}  // namespace safegrad::models
