// hf_config.h: the shape of a decoder, read from a Hugging Face config.json.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace safegrad::models {

/// Llama-3 frequency scaling ("rope_type": "llama3"); the other types are refused by name.
struct Llama3RopeScaling {
  double factor, low_freq_factor, high_freq_factor;
  int64_t original_max_position_embeddings;
};

/// A pre-norm decoder with rotary embeddings, grouped-query attention and SwiGLU: the Llama, Qwen2
/// and Qwen3 families.
struct DecoderConfig {
  std::string architecture;  ///< LlamaForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim =
      0;  ///< if not given: 128 for Qwen3 (as transformers), else hidden_size / heads
  int64_t max_positions = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  std::optional<Llama3RopeScaling> rope_scaling;
  bool tied_embeddings = false;
  bool qkv_bias =
      false;  ///< Qwen2: always; Llama and Qwen3: attention_bias (Llama's also sets o_proj's bias)
  bool o_bias = false;
  bool mlp_bias = false;  ///< Llama: mlp_bias
  bool qk_norm = false;   ///< Qwen3
};

/// Parses and checks config.json. Understands rope_theta both at the top level and inside
/// rope_parameters / rope_scaling (newer transformers). Throws ModelError (file, key, got, allowed)
/// for an unknown architecture, a hidden_act other than silu, an active sliding window
/// (use_sliding_window true), unknown rope types, missing keys, sizes that are not positive or
/// contradict each other (heads % kv_heads, odd head_dim).
DecoderConfig read_decoder_config(const std::string& config_json_path);

}  // namespace safegrad::models
