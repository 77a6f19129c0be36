// loss_rows.h: losses of rows of logits, with the gradient written over the logits in the same
// sweep.
#pragma once
#include <ATen/core/Tensor.h>

namespace safegrad {

/// Sum over rows of −log softmax(logits)[target]; logits [n, V] f32 <- softmax(logits) −
/// onehot(target), the gradient of that sum. targets [n] i64 in [0, V).
double cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets);

/// Sum over rows of KL(p_ref ‖ p) = Σ p_ref (log p_ref − log p); logits [n, V] f32 <- p − p_ref,
/// the gradient of that sum. reference [n, V] f32 is overwritten.
double kl_rows(at::Tensor& logits, at::Tensor& reference);

/// out[i] = log softmax(logits[i])[targets[i]]; logits [n, V] f32, targets [n] i64; out [n] f64.
at::Tensor log_probabilities(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace safegrad
