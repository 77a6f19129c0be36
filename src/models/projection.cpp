#include "models/projection.h"

#include <algorithm>

#include <ATen/ATen.h>

namespace safegrad::models {
namespace {

at::Tensor columns(const at::Tensor& x, int64_t column, const Parameter& weight) {
  return x.narrow(1, column, weight.shape[0]);
}

at::Tensor tokens_of(const at::Tensor& x, const PackedBatch& batch, size_t k) {
  return x.narrow(0, batch.segments[k], batch.segments[k + 1] - batch.segments[k]);
}

bool drops(const LoraPart& part, const PackedBatch& batch) {
  return part.dropout > 0 && batch.dropout_keys.defined();
}

}  // namespace

at::Tensor Projection::adapter_input(const LoraPart& part, const at::Tensor& x,
                                     const PackedBatch& batch) const {
  return drops(part, batch) ? kernels_->dropout(x, batch, part.dropout, part.site) : x;
}

void Projection::add(LinearPart part) {
  out_features_ = std::max(out_features_, part.column + part.weight->shape[0]);
  linear_.push_back(part);
}

void Projection::add(LoraPart part) {
  lora_.push_back(part);
}

int64_t Projection::in_features() const {
  return linear_.front().weight->shape[1];
}

bool Projection::needs_input() const {
  return std::any_of(linear_.begin(), linear_.end(),
                     [](const LinearPart& p) { return p.weight->trainable; }) ||
         std::any_of(lora_.begin(), lora_.end(), [](const LoraPart& p) { return p.a->trainable; });
}

at::Tensor Projection::forward(const at::Tensor& x, const PackedBatch& batch,
                               LoraHidden* hidden) const {
  at::Tensor y = at::empty({x.size(0), out_features_}, x.options());
  for (const LinearPart& part : linear_) {
    at::Tensor slice = columns(y, part.column, *part.weight);
    if (part.bias) {
      at::addmm_out(slice, part.bias->value, x, part.weight->value.t());
    } else {
      at::mm_out(slice, x, part.weight->value.t());
    }
  }
  if (!batch.adapters) return y;
  for (const LoraPart& part : lora_) {
    const at::Tensor h = at::mm(adapter_input(part, x, batch), part.a->value.t());
    columns(y, part.column, *part.b).addmm_(h, part.b->value.t(), 1.0, part.scale);
    if (hidden) hidden->push_back(h);
  }
  return y;
}

at::Tensor Projection::input_gradient(const at::Tensor& dy, const PackedBatch& batch) const {
  at::Tensor dx = at::empty({dy.size(0), in_features()}, dy.options());
  for (size_t i = 0; i < linear_.size(); ++i) {
    const LinearPart& part = linear_[i];
    const at::Tensor slice = columns(dy, part.column, *part.weight);
    at::addmm_out(dx, dx, slice, part.weight->value, /*beta=*/i == 0 ? 0.0 : 1.0);
  }
  for (const LoraPart& part : lora_) {
    const at::Tensor dh = at::mm(columns(dy, part.column, *part.b), part.b->value).mul_(part.scale);
    if (drops(part, batch)) {  // the mask is linear: the same draws, applied to the gradient
      dx.add_(kernels_->dropout(at::mm(dh, part.a->value), batch, part.dropout, part.site));
    } else {
      dx.addmm_(dh, part.a->value);
    }
  }
  return dx;
}

void Projection::weight_gradients(const at::Tensor& dy, const at::Tensor& x,
                                  const PackedBatch& batch, const LoraHidden& hidden) const {
  const bool scores = batch.token_scores.defined();
  for (size_t k = 0; k < batch.objectives(); ++k) {
    const at::Tensor dy_k = tokens_of(dy, batch, k);
    if (dy_k.size(0) == 0) continue;
    for (const LinearPart& part : linear_) {
      const at::Tensor slice = columns(dy_k, part.column, *part.weight);
      if (part.weight->wants(k)) part.weight->add_product(k, slice, tokens_of(x, batch, k));
      if (part.bias && part.bias->wants(k)) part.bias->add(k, slice.sum(0));
    }
  }
  for (const LinearPart& part : linear_) {
    if (scores) add_scores(part, dy, x, batch);
  }
  for (size_t i = 0; i < lora_.size(); ++i) {
    const LoraPart& part = lora_[i];
    const at::Tensor input = adapter_input(part, x, batch);
    for (size_t k = 0; k < batch.objectives(); ++k) {
      const at::Tensor dy_k = columns(tokens_of(dy, batch, k), part.column, *part.b);
      if (dy_k.size(0) == 0 || !part.a->wants(k)) continue;
      part.b->add_product(k, dy_k, tokens_of(hidden[i], batch, k), part.scale);
      part.a->add_product(k, at::mm(dy_k, part.b->value), tokens_of(input, batch, k), part.scale);
    }
    if (scores) add_scores(part, dy, input, hidden[i], batch);
  }
}

// With dW = Σ_t dy_t x_tᵀ a token's part of ⟨dW, A⟩ is dy_t · (A x_t): the layer's own product with
// the direction in the weight's place, as large as the product for dW.
void Projection::add_scores(const LinearPart& part, const at::Tensor& dy, const at::Tensor& x,
                            const PackedBatch& batch) const {
  const at::Tensor slice = columns(tokens_of(dy, batch, 0), part.column, *part.weight);
  auto add = [&](const at::Tensor& y) {
    kernels_->add_row_products(slice, y, 1.0, batch.token_scores);
  };
  if (part.weight->direction)
    add(at::mm(tokens_of(x, batch, 0), part.weight->direction->value.t()));
  if (part.bias && part.bias->direction) add(part.bias->direction->value.expand_as(slice));
}

void Projection::add_scores(const LoraPart& part, const at::Tensor& dy, const at::Tensor& input,
                            const at::Tensor& hidden, const PackedBatch& batch) const {
  if (!part.a->direction) return;
  const at::Tensor slice = columns(tokens_of(dy, batch, 0), part.column, *part.b);
  auto add = [&](const at::Tensor& gradient, const at::Tensor& x, const Parameter& weight) {
    kernels_->add_row_products(gradient,
                               at::mm(tokens_of(x, batch, 0), weight.direction->value.t()),
                               part.scale, batch.token_scores);
  };
  add(slice, hidden, *part.b);
  add(at::mm(slice, part.b->value), input, *part.a);
}

double Projection::forward_macs() const {
  double macs = 0;
  for (const LinearPart& part : linear_) macs += static_cast<double>(part.weight->numel());
  for (const LoraPart& part : lora_) {
    macs += static_cast<double>(part.a->numel() + part.b->numel());
  }
  return macs;
}

int64_t Projection::widest_trained() const {
  int64_t widest = 0;
  for (const LinearPart& part : linear_) {
    if (part.weight->trainable) widest = std::max(widest, part.weight->shape[0]);
  }
  return widest;
}

double Projection::weight_gradient_macs() const {
  double macs = 0;
  for (const LinearPart& part : linear_) {
    if (part.weight->trainable) macs += static_cast<double>(part.weight->numel());
  }
  for (const LoraPart& part : lora_) {
    macs += static_cast<double>(part.a->numel() + part.b->numel());
  }
  return macs;
}

}  // namespace safegrad::models
