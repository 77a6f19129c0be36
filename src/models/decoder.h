// decoder.h: Llama, Qwen2 and Qwen3 decoders as units of parameters, with an explicit backward.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/causal_lm.h"
#include "core/config.h"
#include "models/hf_config.h"
#include "models/projection.h"

namespace safegrad::models {

/// What trains: the adapters if `lora` is set, else the parameters whose Hugging Face name matches
/// a pattern as a whole.
struct TrainableSet {
  std::optional<LoraConfig> lora;
  std::vector<std::string> patterns = {".*"};
};

/// Throws ConfigError if a pattern set selects nothing or a LoRA target does not exist.
class Decoder : public CausalLM {
 public:
  Decoder(DecoderConfig config, const TrainableSet& trainable, const Backend& backend);

  const DecoderConfig& config() const { return config_; }
  const Backend& backend() const override { return backend_; }
  int64_t width() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_positions() const override { return config_.max_positions; }
  int64_t blocks() const override { return config_.layers; }

  const std::vector<Unit>& units() const override { return units_; }
  size_t embedding_unit() const override { return 0; }
  size_t block_unit(int64_t block) const override { return static_cast<size_t>(block) + 1; }
  std::vector<size_t> head_units() const override;
  int adapter_unit() const override { return adapter_unit_; }
  int64_t lowest_trainable_block() const override { return lowest_trainable_block_; }

  at::Tensor embed(const PackedBatch& batch) override;
  void embed_backward(const PackedBatch& batch, const at::Tensor& dx) override;
  at::Tensor forward_block(int64_t block, const at::Tensor& x, const PackedBatch& batch,
                           std::unique_ptr<Activations>* keep) override;
  at::Tensor backward_block(int64_t block, std::unique_ptr<Activations> kept, at::Tensor dy,
                            const PackedBatch& batch, bool need_dx) override;
  at::Tensor final_norm(const at::Tensor& x) override;
  at::Tensor final_norm_backward(const at::Tensor& x, const at::Tensor& dh,
                                 const PackedBatch& batch) override;
  Parameter& head() override { return *head_; }
  std::vector<ExportEntry> export_entries(bool merged) const override;
  void export_unit(size_t unit, bool merged, ModelSink& sink) const override;
  Flops flops(const PackedBatch& batch) const override;
  BlockMemory block_memory(const PackedBatch& batch, const KernelMemory& kernels) const override;
  int64_t table_bytes(const PackedBatch& batch) const override;

 private:
  struct Block {
    explicit Block(const Kernels& k) : qkv(k), o(k), gate_up(k), down(k) {}
    Parameter *input_norm = nullptr, *post_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr;
    Projection qkv, o, gate_up, down;
  };

  using Selector = std::function<bool(const std::string&)>;
  Parameter* add(Unit& unit, const std::string& name, std::vector<int64_t> shape,
                 const Selector& trains);
  void add_projection(Unit& unit, Projection& projection, const std::string& prefix,
                      const std::vector<std::pair<std::string, int64_t>>& parts, int64_t in,
                      bool bias, const Selector& trains);
  void build_block(int64_t index, const Selector& trains);
  void add_adapters(const LoraConfig& lora);
  void find_lowest_trainable_block();
  void prepare_rotary(const PackedBatch& batch);
  void rotate_qk(at::Tensor& qkv, const PackedBatch& batch, bool inverse) const;
  void normalise_heads(struct BlockActivations& kept, at::Tensor& qkv, const Block& block) const;
  void norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                     Parameter& weight, const std::vector<int64_t>& row_segments,
                     const at::Tensor& scores, at::Tensor& dx) const;
  void normalise_heads_backward(const struct BlockActivations& kept, at::Tensor& dqkv,
                                const Block& block, const PackedBatch& batch) const;

  const Backend& backend_;
  const Kernels& kernels_;
  DecoderConfig config_;
  AttentionShape attention_;
  std::deque<Parameter> parameters_;  // a deque: addresses stay
  std::vector<Unit> units_;
  std::vector<Block> blocks_;
  Parameter* embedding_ = nullptr;
  Parameter* norm_ = nullptr;
  Parameter* head_ = nullptr;
  int adapter_unit_ = -1;
  struct Adapter {
    const Parameter *a, *b;
    double scale;
  };
  std::map<std::string, Adapter> adapters_;  // by the Hugging Face name of the weight they change
  int64_t lowest_trainable_block_ = 0;
  at::Tensor cos_, sin_;  // [positions, head_dim / 2] f32, grown to the longest sequence seen
};

}  // namespace safegrad::models
