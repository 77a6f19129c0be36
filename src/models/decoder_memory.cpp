// decoder_memory.cpp: the bytes that a block's forward and backward hold, in the order in which
// decoder.cpp makes them.
#include <algorithm>

#include "core/kernel_memory.h"
#include "models/decoder.h"

namespace safegrad::models {
namespace {

constexpr int64_t kFloat = 4;

// Of one projection with adapters on T tokens, in bytes.
struct AdapterMemory {
  int64_t hidden = 0;          // x Aᵀ of every adapter, kept
  int64_t dropped = 0;         // its input after dropout, while it is multiplied
  int64_t input_gradient = 0;  // besides the gradient itself
  int64_t scores = 0;          // of objective 0's tokens, linear layers included
};

}  // namespace

BlockMemory Decoder::block_memory(const PackedBatch& batch, const KernelMemory& kernels) const {
  const Block& block = blocks_.front();
  const int64_t tokens = batch.size(), unit = tokens * kernels.element, row = tokens * kFloat;
  const int64_t wide = unit * config_.hidden_size, feed = unit * config_.intermediate_size;
  const int64_t heads = unit * attention_.heads * attention_.head_dim;
  const int64_t qkv = heads + 2 * unit * attention_.kv_heads * attention_.head_dim;
  const AttentionMemory attention = kernels.attention(attention_, batch);
  const int64_t first = batch.segments[1] * kernels.element;  // objective 0's
  auto adapters = [&](const Projection& projection) {
    AdapterMemory m;
    m.scores = first * projection.widest_trained();
    for (const LoraPart& part : projection.adapters()) {
      const int64_t rank = unit * part.a->shape[0], input = unit * part.a->shape[1];
      m.hidden += rank;
      if (part.dropout > 0) m.dropped = input;
      m.input_gradient = std::max(m.input_gradient, rank + (part.dropout > 0 ? 2 * input : 0));
      const int64_t scores = first * std::max(part.b->shape[0], 2 * part.a->shape[0]);
      m.scores = std::max(m.scores, scores + (part.dropout > 0 ? input : 0));
    }
    return m;
  };
  const AdapterMemory a_qkv = adapters(block.qkv), a_o = adapters(block.o),
                      a_gate_up = adapters(block.gate_up), a_down = adapters(block.down);

  // Forward: each stage holds what the stages before it keep.
  BlockMemory m;
  int64_t kept = row + qkv + a_qkv.hidden;
  auto stage = [](int64_t& most, int64_t bytes) { most = std::max(most, bytes); };
  stage(m.forward, kept + wide + a_qkv.dropped);
  if (config_.qk_norm) {
    kept += qkv - (qkv - heads) / 2 + row * (attention_.heads + attention_.kv_heads);  // not v
    stage(m.forward, kept + heads);
  }
  kept += attention.saved + heads;
  stage(m.forward, kept + attention.forward);
  kept += wide + a_o.hidden + row + 2 * feed + a_gate_up.hidden;
  stage(m.forward, kept + std::max(wide + a_gate_up.dropped, a_o.dropped));
  kept += a_down.hidden;
  stage(m.forward, kept + feed + wide + a_down.dropped);
  m.kept = kept;

  auto normed = [&](const Projection& p) { return p.needs_input() ? wide + row : 0; };
  stage(m.backward, feed + std::max(a_down.input_gradient, 3 * feed));
  stage(m.backward, 3 * feed + a_down.dropped + a_down.hidden);
  stage(m.backward, 2 * feed + normed(block.gate_up) + a_gate_up.dropped + a_gate_up.hidden);
  stage(m.backward, 2 * feed + wide + a_gate_up.input_gradient);
  stage(m.backward, heads + a_o.input_gradient);
  stage(m.backward, heads + qkv + attention.backward);
  if (config_.qk_norm) stage(m.backward, qkv + 2 * heads);
  stage(m.backward, qkv + normed(block.qkv) + a_qkv.dropped + a_qkv.hidden);
  stage(m.backward, qkv + wide + a_qkv.input_gradient);

  // The same with a product of the direction beside the gradients' temporaries. Norms have none
  // where they do not train.
  auto norm = [&](const Parameter* weight, int64_t width) {
    return weight && weight->trainable ? first * width + batch.segments[1] * kFloat : 0;
  };
  m.scored = m.backward;
  stage(m.scored, 3 * feed + a_down.scores);
  stage(m.scored, 2 * feed + normed(block.gate_up) + a_gate_up.scores);
  stage(m.scored, 2 * feed + wide + norm(block.post_norm, config_.hidden_size));
  stage(m.scored, a_o.scores);
  if (config_.qk_norm)
    stage(m.scored, qkv + 2 * heads + norm(block.q_norm, attention_.heads * attention_.head_dim));
  stage(m.scored, qkv + normed(block.qkv) + a_qkv.scores);
  stage(m.scored, qkv + wide + norm(block.input_norm, config_.hidden_size));
  return m;
}

int64_t Decoder::table_bytes(const PackedBatch& batch) const {
  return batch.longest * config_.head_dim * kFloat;  // cosines and sines
}

}  // namespace safegrad::models
