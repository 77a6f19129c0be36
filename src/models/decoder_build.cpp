// decoder_build.cpp: which parameters a decoder has, how they group into units, and which of them
// train.
#include <algorithm>
#include <cmath>
#include <regex>

#include "core/error.h"
#include "models/decoder.h"

namespace safegrad::models {

Parameter* Decoder::add(Unit& unit, const std::string& name, std::vector<int64_t> shape,
                        const Selector& trains) {
  Parameter parameter;
  parameter.name = name;
  parameter.block = unit.name;
  parameter.trainable = trains(name);
  parameter.pieces = {{name, 0, shape[0]}};
  parameter.shape = std::move(shape);
  parameters_.push_back(std::move(parameter));
  unit.parameters.push_back(&parameters_.back());
  return &parameters_.back();
}

// Matrices that share an input become one parameter, so that one GEMM serves all; unless only some
// of them train.
void Decoder::add_projection(Unit& unit, Projection& projection, const std::string& prefix,
                             const std::vector<std::pair<std::string, int64_t>>& parts, int64_t in,
                             bool bias, const Selector& trains) {
  auto same = [&](const std::string& suffix) {
    return std::all_of(parts.begin(), parts.end(), [&](const auto& part) {
      return trains(prefix + part.first + suffix) == trains(prefix + parts[0].first + suffix);
    });
  };
  const bool fuse = same(".weight") && (!bias || same(".bias"));
  auto add_fused = [&](const std::string& suffix, bool matrix) {
    int64_t rows = 0;
    std::vector<Piece> pieces;
    for (const auto& [name, out] : parts) {
      pieces.push_back({prefix + name + suffix, rows, out});
      rows += out;
    }
    Parameter* fused =
        add(unit, pieces[0].name,
            matrix ? std::vector<int64_t>{rows, in} : std::vector<int64_t>{rows}, trains);
    fused->pieces = std::move(pieces);
    return fused;
  };
  if (fuse) {
    Parameter* weight = add_fused(".weight", true);
    projection.add(LinearPart{weight, bias ? add_fused(".bias", false) : nullptr, 0});
    return;
  }
  int64_t column = 0;
  for (const auto& [name, out] : parts) {
    Parameter* weight = add(unit, prefix + name + ".weight", {out, in}, trains);
    projection.add(LinearPart{
        weight, bias ? add(unit, prefix + name + ".bias", {out}, trains) : nullptr, column});
    column += out;
  }
}

void Decoder::build_block(int64_t index, const Selector& trains) {
  const auto& c = config_;
  const std::string prefix = fmt::format("model.layers.{}.", index);
  Unit unit{fmt::format("block {}", index), {}, false};
  Block block(kernels_);
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  block.input_norm = add(unit, prefix + "input_layernorm.weight", {c.hidden_size}, trains);
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  add_projection(unit, block.qkv, attention, {{"q_proj", q}, {"k_proj", kv}, {"v_proj", kv}},
                 c.hidden_size, c.qkv_bias, trains);
  if (c.qk_norm) {
    block.q_norm = add(unit, attention + "q_norm.weight", {c.head_dim}, trains);
    block.k_norm = add(unit, attention + "k_norm.weight", {c.head_dim}, trains);
  }
  add_projection(unit, block.o, attention, {{"o_proj", c.hidden_size}}, q, c.o_bias, trains);
  block.post_norm = add(unit, prefix + "post_attention_layernorm.weight", {c.hidden_size}, trains);
  add_projection(unit, block.gate_up, mlp,
                 {{"gate_proj", c.intermediate_size}, {"up_proj", c.intermediate_size}},
                 c.hidden_size, c.mlp_bias, trains);
  add_projection(unit, block.down, mlp, {{"down_proj", c.hidden_size}}, c.intermediate_size,
                 c.mlp_bias, trains);
  units_.push_back(std::move(unit));
  blocks_.push_back(std::move(block));
}

void Decoder::add_adapters(const LoraConfig& lora) {
  const auto& c = config_;
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  struct Target {
    std::string name, parent;
    Projection Block::*projection;
    int64_t in, out, column;
  };
  const std::vector<Target> known = {
      {"q_proj", "self_attn", &Block::qkv, c.hidden_size, q, 0},
      {"k_proj", "self_attn", &Block::qkv, c.hidden_size, kv, q},
      {"v_proj", "self_attn", &Block::qkv, c.hidden_size, kv, q + kv},
      {"o_proj", "self_attn", &Block::o, q, c.hidden_size, 0},
      {"gate_proj", "mlp", &Block::gate_up, c.hidden_size, c.intermediate_size, 0},
      {"up_proj", "mlp", &Block::gate_up, c.hidden_size, c.intermediate_size, c.intermediate_size},
      {"down_proj", "mlp", &Block::down, c.intermediate_size, c.hidden_size, 0}};
  Unit unit{"adapters", {}, true};
  const Selector always = [](const std::string&) { return true; };
  uint64_t site = 0;
  for (int64_t b = 0; b < c.layers; ++b) {
    for (const Target& target : known) {
      ++site;
      if (std::find(lora.targets.begin(), lora.targets.end(), target.name) == lora.targets.end())
        continue;
      const std::string module =
          fmt::format("model.layers.{}.{}.{}", b, target.parent, target.name);
      Parameter* a = add(unit, module + ".lora_A.weight", {lora.rank, target.in}, always);
      Parameter* up = add(unit, module + ".lora_B.weight", {target.out, lora.rank}, always);
      a->block = up->block = units_[block_unit(b)].name;
      adapters_[module + ".weight"] = {a, up, lora.alpha / static_cast<double>(lora.rank)};
      (blocks_[static_cast<size_t>(b)].*target.projection)
          .add(LoraPart{a, up, target.column, lora.alpha / static_cast<double>(lora.rank),
                        lora.dropout, site});
    }
  }
  adapter_unit_ = static_cast<int>(units_.size());
  units_.push_back(std::move(unit));
}

void Decoder::find_lowest_trainable_block() {
  auto trains = [](const Unit& unit) {
    return std::any_of(unit.parameters.begin(), unit.parameters.end(),
                       [](const Parameter* p) { return p->trainable; });
  };
  lowest_trainable_block_ = config_.layers;
  if (embedding_->trainable) {
    lowest_trainable_block_ = -1;
  } else if (adapter_unit_ >= 0) {
    lowest_trainable_block_ = 0;
  } else {
    for (int64_t b = config_.layers - 1; b >= 0; --b) {
      if (trains(units_[block_unit(b)])) lowest_trainable_block_ = b;
    }
  }
  SAFEGRAD_CHECK(std::any_of(units_.begin(), units_.end(), trains), ConfigError,
                 "model.trainable selects no parameter; names look like {} and {}",
                 embedding_->name, units_[1].parameters[1]->name);
}

Decoder::Decoder(DecoderConfig config, const TrainableSet& trainable, const Backend& backend)
    : backend_(backend),
      kernels_(backend.kernels()),
      config_(std::move(config)),
      attention_{config_.heads, config_.kv_heads, config_.head_dim} {
  kernels_.require(attention_, config_.hidden_size);
  std::vector<std::regex> patterns;
  for (const std::string& pattern : trainable.patterns) patterns.emplace_back(pattern);
  const Selector trains = [&](const std::string& name) {
    return !trainable.lora &&
           std::any_of(patterns.begin(), patterns.end(),
                       [&](const std::regex& p) { return std::regex_match(name, p); });
  };
  Unit embedding{"embedding", {}, false};
  embedding_ = add(embedding, "model.embed_tokens.weight",
                   {config_.vocab_size, config_.hidden_size}, trains);
  units_.push_back(std::move(embedding));
  for (int64_t b = 0; b < config_.layers; ++b) build_block(b, trains);
  Unit head{"head", {}, false};
  norm_ = add(head, "model.norm.weight", {config_.hidden_size}, trains);
  head_ = config_.tied_embeddings
              ? embedding_
              : add(head, "lm_head.weight", {config_.vocab_size, config_.hidden_size}, trains);
  units_.push_back(std::move(head));
  if (trainable.lora) add_adapters(*trainable.lora);
  find_lowest_trainable_block();
}

}  // namespace safegrad::models
