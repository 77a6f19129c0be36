#include "models/decoder.h"

#include <ATen/ATen.h>

#include "models/rotary.h"

namespace safegrad::models {

/// Kept from forward to backward. Norm outputs and silu(gate)·up are not: recomputing them is one
/// cheap sweep.
struct BlockActivations : Activations {
  at::Tensor x;                             // [T, D] input
  at::Tensor rstd1;                         // [T]
  at::Tensor qkv;                           // [T, (heads + 2 kv) d] rotated
  at::Tensor raw_q, raw_k, rstd_q, rstd_k;  // before q/k norm (Qwen3 only)
  at::Tensor attended;                      // [T, heads d]
  std::vector<at::Tensor> attention;        // what its backward needs
  at::Tensor middle;                        // [T, D] after attention's residual
  at::Tensor rstd2;                         // [T]
  at::Tensor gate_up;                       // [T, 2F]
  LoraHidden lora_qkv, lora_o, lora_gate_up, lora_down;
};

std::vector<size_t> Decoder::head_units() const {
  const size_t head_unit = static_cast<size_t>(config_.layers) + 1;
  if (config_.tied_embeddings) return {embedding_unit(), head_unit};
  return {head_unit};
}

at::Tensor Decoder::embed(const PackedBatch& batch) {
  return embedding_->value.index_select(0, batch.tokens);
}

void Decoder::embed_backward(const PackedBatch& batch, const at::Tensor& dx) {
  if (batch.token_scores.defined() && embedding_->direction) {
    const int64_t n = batch.segments[1];
    const at::Tensor rows =
        embedding_->direction->value.index_select(0, batch.tokens.narrow(0, 0, n));
    kernels_.add_row_products(dx.narrow(0, 0, n), rows, 1.0, batch.token_scores);
  }
  for (size_t k = 0; k < batch.objectives(); ++k) {
    if (!embedding_->wants(k)) continue;
    const int64_t begin = batch.segments[k], length = batch.segments[k + 1] - begin;
    if (length == 0) continue;
    kernels_.add_rows(embedding_->started(k), batch.tokens.narrow(0, begin, length),
                      dx.narrow(0, begin, length));
  }
}

void Decoder::prepare_rotary(const PackedBatch& batch) {
  if (cos_.defined() && cos_.size(0) >= batch.positions_end) return;
  const auto [cos, sin] = rotary_tables(config_, batch.positions_end);
  cos_ = backend_.upload(cos);
  sin_ = backend_.upload(sin);
}

void Decoder::rotate_qk(at::Tensor& qkv, const PackedBatch& batch, bool inverse) const {
  const int64_t heads = attention_.heads + attention_.kv_heads, d = attention_.head_dim;
  kernels_.rotate(qkv.narrow(1, 0, heads * d).view({qkv.size(0), heads, d}), batch.positions, cos_,
                  sin_, inverse);
}

void Decoder::normalise_heads(BlockActivations& kept, at::Tensor& qkv, const Block& block) const {
  const int64_t tokens = qkv.size(0), d = attention_.head_dim;
  auto normalise = [&](int64_t first, int64_t heads, const Parameter& weight, at::Tensor& raw,
                       at::Tensor& rstd) {
    at::Tensor slice = qkv.narrow(1, first * d, heads * d);
    raw = slice.reshape({tokens * heads, d}).clone();
    slice.copy_(
        kernels_.rms_norm(raw, weight.value, config_.rms_norm_eps, rstd).view({tokens, heads * d}));
  };
  normalise(0, attention_.heads, *block.q_norm, kept.raw_q, kept.rstd_q);
  normalise(attention_.heads, attention_.kv_heads, *block.k_norm, kept.raw_k, kept.rstd_k);
}

// `scores` [tokens of objective 0] or undefined. A norm is linear in its weight, so ⟨dw, direction⟩
// of a row is ⟨dy, the norm with the direction as its weight⟩; heads of one token lie side by side
// in dy.
void Decoder::norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                            Parameter& weight, const std::vector<int64_t>& row_segments,
                            const at::Tensor& scores, at::Tensor& dx) const {
  const int64_t scored = row_segments[1];
  if (scores.defined() && weight.direction && scored > 0) {
    at::Tensor unused_rstd;
    const at::Tensor y = kernels_.rms_norm(x.narrow(0, 0, scored), weight.direction->value,
                                           config_.rms_norm_eps, unused_rstd);
    const int64_t tokens = scores.size(0);
    kernels_.add_row_products(dy.narrow(0, 0, scored).reshape({tokens, -1}), y.view({tokens, -1}),
                              1.0, scores);
  }
  kernels_.rms_norm_backward(dy, x, rstd, weight, row_segments, dx);
}

void Decoder::normalise_heads_backward(const BlockActivations& kept, at::Tensor& dqkv,
                                       const Block& block, const PackedBatch& batch) const {
  const int64_t tokens = dqkv.size(0), d = attention_.head_dim;
  auto backward = [&](int64_t first, int64_t heads, Parameter& weight, const at::Tensor& raw,
                      const at::Tensor& rstd) {
    at::Tensor slice = dqkv.narrow(1, first * d, heads * d);
    std::vector<int64_t> rows = batch.segments;
    for (int64_t& boundary : rows) boundary *= heads;
    at::Tensor draw = at::zeros({tokens * heads, d}, dqkv.options());
    norm_backward(slice.reshape({tokens * heads, d}), raw, rstd, weight, rows, batch.token_scores,
                  draw);
    slice.copy_(draw.view({tokens, heads * d}));
  };
  backward(0, attention_.heads, *block.q_norm, kept.raw_q, kept.rstd_q);
  backward(attention_.heads, attention_.kv_heads, *block.k_norm, kept.raw_k, kept.rstd_k);
}

at::Tensor Decoder::forward_block(int64_t index, const at::Tensor& x, const PackedBatch& batch,
                                  std::unique_ptr<Activations>* keep) {
  const Block& block = blocks_[static_cast<size_t>(index)];
  prepare_rotary(batch);
  auto kept = std::make_unique<BlockActivations>();
  kept->x = x;
  kept->qkv = block.qkv.forward(
      kernels_.rms_norm(x, block.input_norm->value, config_.rms_norm_eps, kept->rstd1), batch,
      &kept->lora_qkv);
  if (config_.qk_norm) normalise_heads(*kept, kept->qkv, block);
  rotate_qk(kept->qkv, batch, /*inverse=*/false);
  kept->attended = kernels_.attention(kept->qkv, attention_, batch, kept->attention);
  kept->middle = block.o.forward(kept->attended, batch, &kept->lora_o).add_(x);
  kept->gate_up = block.gate_up.forward(
      kernels_.rms_norm(kept->middle, block.post_norm->value, config_.rms_norm_eps, kept->rstd2),
      batch, &kept->lora_gate_up);
  at::Tensor y = block.down.forward(kernels_.swiglu(kept->gate_up), batch, &kept->lora_down)
                     .add_(kept->middle);
  if (keep) *keep = std::move(kept);
  return y;
}

at::Tensor Decoder::backward_block(int64_t index, std::unique_ptr<Activations> activations,
                                   at::Tensor dy, const PackedBatch& batch, bool need_dx) {
  const Block& block = blocks_[static_cast<size_t>(index)];
  auto& kept = static_cast<BlockActivations&>(*activations);
  const double eps = config_.rms_norm_eps;
  at::Tensor unused_rstd;
  auto normed = [&](const Projection& projection, const at::Tensor& x, const Parameter& weight) {
    return projection.needs_input() ? kernels_.rms_norm(x, weight.value, eps, unused_rstd)
                                    : at::Tensor();
  };

  at::Tensor dgate_up, act;
  kernels_.swiglu_backward(block.down.input_gradient(dy, batch), kept.gate_up, dgate_up, act);
  block.down.weight_gradients(dy, act, batch, kept.lora_down);
  act.reset();
  block.gate_up.weight_gradients(dgate_up, normed(block.gate_up, kept.middle, *block.post_norm),
                                 batch, kept.lora_gate_up);
  at::Tensor& dmiddle = dy;  // the residual path: dy itself, plus what comes back through the norm
  norm_backward(block.gate_up.input_gradient(dgate_up, batch), kept.middle, kept.rstd2,
                *block.post_norm, batch.segments, batch.token_scores, dmiddle);
  dgate_up.reset();

  block.o.weight_gradients(dmiddle, kept.attended, batch, kept.lora_o);
  at::Tensor dqkv = kernels_.attention_backward(block.o.input_gradient(dmiddle, batch), kept.qkv,
                                                kept.attended, kept.attention, attention_, batch);
  rotate_qk(dqkv, batch, /*inverse=*/true);
  if (config_.qk_norm) normalise_heads_backward(kept, dqkv, block, batch);
  block.qkv.weight_gradients(dqkv, normed(block.qkv, kept.x, *block.input_norm), batch,
                             kept.lora_qkv);
  if (!need_dx && !block.input_norm->trainable) return {};
  at::Tensor& dx = dmiddle;
  norm_backward(block.qkv.input_gradient(dqkv, batch), kept.x, kept.rstd1, *block.input_norm,
                batch.segments, batch.token_scores, dx);
  return dx;
}

at::Tensor Decoder::final_norm(const at::Tensor& x) {
  at::Tensor rstd;
  return kernels_.rms_norm(x, norm_->value, config_.rms_norm_eps, rstd);
}

at::Tensor Decoder::final_norm_backward(const at::Tensor& x, const at::Tensor& dh,
                                        const PackedBatch& batch) {
  at::Tensor rstd;
  kernels_.rms_norm(x, norm_->value, config_.rms_norm_eps, rstd);
  at::Tensor dx = at::zeros_like(x);
  const bool scores = batch.token_scores.defined();
  at::Tensor row_scores;
  if (scores) row_scores = at::zeros({batch.scored_segments[1]}, batch.token_scores.options());
  norm_backward(dh, x, rstd, *norm_, batch.scored_segments, row_scores, dx);
  if (scores) add_row_scores(batch, row_scores);
  return dx;
}

Flops Decoder::flops(const PackedBatch& batch) const {
  const auto tokens = static_cast<double>(batch.size());
  const double scored =
      batch.scored_segments.empty() ? 0.0 : static_cast<double>(batch.scored_segments.back());
  const auto of_first = static_cast<double>(batch.segments.size() > 1 ? batch.segments[1] : 0);
  const int64_t scored_of_first = batch.scored_segments.size() > 1 ? batch.scored_segments[1] : 0;
  double pairs = 0;  // causal (query, key) pairs
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const auto i = static_cast<size_t>(n);
    const auto length = static_cast<double>(batch.cu_seqlens[i + 1] - batch.cu_seqlens[i]);
    pairs += length * (length + 1) / 2;
  }
  // Forward: scores and values. Backward: the gradients of scores, values, queries and keys.
  const double attention_macs =
      2 * pairs * static_cast<double>(attention_.heads * attention_.head_dim);
  Flops flops;
  for (int64_t b = 0; b < config_.layers; ++b) {
    const Block& block = blocks_[static_cast<size_t>(b)];
    flops.forward += 2 * attention_macs;
    for (const Projection* p : {&block.qkv, &block.o, &block.gate_up, &block.down}) {
      flops.forward += 2 * p->forward_macs() * tokens;
      if (b < lowest_trainable_block_) continue;
      flops.weight_grad += 2 * p->weight_gradient_macs() * tokens;
      flops.scores += 2 * p->weight_gradient_macs() * of_first;
      const bool needed = p != &block.qkv || b > lowest_trainable_block_;
      if (needed) flops.input_grad += 2 * p->forward_macs() * tokens;
    }
    if (b >= lowest_trainable_block_) flops.input_grad += 2 * 2 * attention_macs;
  }
  const double head = 2 * static_cast<double>(head_->numel()) * scored;
  flops.forward += head;
  flops.input_grad += head;
  if (!head_->trainable) return flops;
  flops.weight_grad += head;
  flops.scores += 2 * static_cast<double>(head_->numel() * scored_of_first);
  return flops;
}

}  // namespace safegrad::models
