// head_loss.h: output matrix and loss together, a chunk of scored positions at a time, backward
// included.
#pragma once
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "core/parameter.h"

namespace safegrad {

/// Rows of logits that exist at a time. 256 rows of a 49,152-word vocabulary are 50 MB and make the
/// GEMMs large enough.
inline constexpr int64_t kHeadChunk = 256;

/// Cross-entropy of h Wᵀ, summed over the n scored rows. h [n, D], targets [n], W [V, D].
/// If dh [n, D] is defined: dh <- gradient of the sum with respect to h, and W's gradient of
/// objective k is added to.
double cross_entropy_head(const at::Tensor& h, const at::Tensor& targets, Parameter& weight,
                          size_t k, at::Tensor dh);

/// KL(p_ref ‖ p), summed over the n rows, p = softmax(h Wᵀ), p_ref = softmax(h_ref W_refᵀ):
/// arXiv:2508.07172 Eq. 6. The reference's last hidden states [n, D] stand for its logits, which
/// never exist beyond a chunk. dh as above.
double kl_head(const at::Tensor& h, const at::Tensor& h_ref, Parameter& weight,
               const at::Tensor& reference_weight, size_t k, at::Tensor dh);

}  // namespace safegrad
