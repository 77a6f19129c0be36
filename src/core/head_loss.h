// head_loss.h: output matrix and loss together, a chunk of scored positions at a time, backward
// included.
#pragma once
#include <cstddef>

#include <ATen/core/Tensor.h>

#include "core/kernels.h"
#include "core/parameter.h"

namespace safegrad {

/// loss [1] f64 += cross-entropy of h Wᵀ, summed over the n scored rows. h [n, D], targets [n],
/// W [V, D]. If dh [n, D] is defined: dh <- gradient of the sum with respect to h, and W's gradient
/// of objective k is added to. If row_scores [n] f64 is defined and W trains: row_scores += ⟨the
/// row's part of W's gradient, W's direction⟩.
void cross_entropy_head(const Kernels& kernels, const at::Tensor& h, const at::Tensor& targets,
                        Parameter& weight, size_t k, at::Tensor dh, at::Tensor loss,
                        const at::Tensor& row_scores = {});

/// loss [1] f64 += KL(p_ref ‖ p), summed over the n rows, p = softmax(h Wᵀ),
/// p_ref = softmax(h_ref W_refᵀ): arXiv:2508.07172 Eq. 6. The reference's last hidden states
/// [n, D] stand for its logits, which never exist beyond a chunk. dh as above.
void kl_head(const Kernels& kernels, const at::Tensor& h, const at::Tensor& h_ref,
             Parameter& weight, const at::Tensor& reference_weight, size_t k, at::Tensor dh,
             at::Tensor loss);

/// The cross-entropy with scores in place of W's gradient: dh and row_scores as in
/// cross_entropy_head. Returns the log-probability of each target, [n] f64.
at::Tensor cross_entropy_head_scores(const Kernels& kernels, const at::Tensor& h,
                                     const at::Tensor& targets, const Parameter& weight,
                                     at::Tensor dh, const at::Tensor& row_scores);

/// Of each scored row: the log-probability of its target, and whether decoding would choose it.
struct ScoredRows {
  at::Tensor log_p;   ///< [n] f64
  at::Tensor greedy;  ///< [n] bool
};
ScoredRows score_rows(const Kernels& kernels, const at::Tensor& h, const at::Tensor& targets,
                      const at::Tensor& weight);

/// out[i] = log softmax(logits[i])[targets[i]]; logits [n, V], targets [n] i64; out [n] f64.
at::Tensor log_probabilities(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace safegrad
