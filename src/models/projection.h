// projection.h: linear layers that share an input, with weight gradients split by objective and
// LoRA adapters.
#pragma once
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/kernels.h"
#include "core/packed_batch.h"
#include "core/parameter.h"

namespace safegrad::models {

/// y[:, column .. column+out) = x Wᵀ + b.
struct LinearPart {
  Parameter* weight;  ///< [out, in]
  Parameter* bias;    ///< [out] or null
  int64_t column;
};

/// y[:, column .. column+out) += scale · dropout(x) Aᵀ Bᵀ  (LoRA, arXiv:2106.09685).
struct LoraPart {
  Parameter* a;  ///< [rank, in]
  Parameter* b;  ///< [out, rank]
  int64_t column;
  double scale, dropout;
  uint64_t site;  ///< names this adapter to the dropout generator
};

/// What a projection keeps from forward to backward besides its input: x Aᵀ of each adapter, [T,
/// rank].
using LoraHidden = std::vector<at::Tensor>;

/// Linear layers side by side, e.g. q, k and v. No weight sits in an autograd graph: values are
/// read when called, and gradients go straight to the parameters, one GEMM per objective over that
/// objective's tokens.
class Projection {
 public:
  explicit Projection(const Kernels& kernels) : kernels_(&kernels) {}

  void add(LinearPart part);
  void add(LoraPart part);

  int64_t in_features() const;
  int64_t out_features() const { return out_features_; }
  const std::vector<LoraPart>& adapters() const { return lora_; }
  /// True if weight_gradients reads the input x.
  bool needs_input() const;

  /// y [T, out] <- x [T, in]; `hidden` may be null.
  at::Tensor forward(const at::Tensor& x, const PackedBatch& batch, LoraHidden* hidden) const;
  /// dx [T, in] <- dy [T, out].
  at::Tensor input_gradient(const at::Tensor& dy, const PackedBatch& batch) const;
  /// Adds every weight gradient that is wanted, and scores where the batch has them. x may be
  /// undefined if !needs_input().
  void weight_gradients(const at::Tensor& dy, const at::Tensor& x, const PackedBatch& batch,
                        const LoraHidden& hidden) const;

  /// Multiply-add pairs per token of the forward product, of the input gradient and of trainable
  /// weight gradients.
  double forward_macs() const;
  double weight_gradient_macs() const;
  /// Outputs of the widest layer, adapters apart, whose weight trains; 0: none does.
  int64_t widest_trained() const;

 private:
  at::Tensor adapter_input(const LoraPart& part, const at::Tensor& x,
                           const PackedBatch& batch) const;

  void add_scores(const LinearPart& part, const at::Tensor& dy, const at::Tensor& x,
                  const PackedBatch& batch) const;
  void add_scores(const LoraPart& part, const at::Tensor& dy, const at::Tensor& input,
                  const at::Tensor& hidden, const PackedBatch& batch) const;

  const Kernels* kernels_;
  std::vector<LinearPart> linear_;
  std::vector<LoraPart> lora_;
  int64_t out_features_ = 0;
};

}  // namespace safegrad::models
