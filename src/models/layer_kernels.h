// layer_kernels.h: the parts of a decoder layer that are not matrix products, forward and backward.
#pragma once
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/packed_batch.h"
#include "core/parameter.h"

namespace safegrad::models {

/// y = x / sqrt(mean(x²) + eps) · w, row by row; the reciprocal root goes to rstd [n] f32. x [n, d]
/// (rows may be strided).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& rstd);

/// dx += the input gradient of rms_norm, and the weight gradient of every objective whose rows are
/// [row_segments[k], row_segments[k+1]). dy, x, dx [n, d] may be strided.
void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                       Parameter& weight, const std::vector<int64_t>& row_segments, at::Tensor& dx);

/// x [T, heads, d] <- rotated in place, halves paired as in Hugging Face checkpoints: (x_i,
/// x_{i+d/2}); cos, sin [positions, d/2]. `inverse`: the transposed rotation, which is the
/// backward.
void rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos, const at::Tensor& sin,
            bool inverse);

/// act [T, F] <- silu(gate) · up, for gate_up [T, 2F] = [gate | up].
at::Tensor swiglu(const at::Tensor& gate_up);

/// dgate_up [T, 2F] and, recomputed in the same sweep, act [T, F], from dact.
void swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up, at::Tensor& dgate_up,
                     at::Tensor& act);

/// Causal grouped-query attention of every packed sequence with itself (and, for probes, with the
/// sequence it continues). qkv [T, (heads + 2 kv_heads) d]; out [T, heads d]; lse: one [1, heads,
/// L] tensor a sequence, for the backward.
struct AttentionShape {
  int64_t heads, kv_heads, head_dim;
};
at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape, const PackedBatch& batch,
                     std::vector<at::Tensor>& lse);

/// dqkv [T, (heads + 2 kv_heads) d] from dout [T, heads d].
at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out,
                              const std::vector<at::Tensor>& lse, const AttentionShape& shape,
                              const PackedBatch& batch);

/// x [T, d] with each element zeroed with probability p, else scaled by 1 / (1 - p). The draw of an
/// element depends on (its sequence's dropout key, `site`, its position, its feature) alone: the
/// same on any layout, and again in the backward.
at::Tensor dropout(const at::Tensor& x, const PackedBatch& batch, double p, uint64_t site);

}  // namespace safegrad::models
