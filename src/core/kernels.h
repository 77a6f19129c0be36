// kernels.h: the loops of a step that are not matrix products, behind one interface for every kind
// of device.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/packed_batch.h"
#include "core/parameter.h"
#include "core/vector_math.h"

namespace safegrad {

/// Grouped-query attention: query heads share `kv_heads` keys and values.
struct AttentionShape {
  int64_t heads, kv_heads, head_dim;
};

/// Elements [begin, end) of a shard; `decays`: weight decay applies to them.
struct UpdateRange {
  int64_t begin, end;
  bool decays;
};

/// What AdamW reads and writes of one shard of S elements.
struct ShardState {
  at::Tensor master, m, v;  ///< [S] f32
  at::Tensor compute;       ///< [S] compute dtype; the same tensor as master, or a copy of it
};

/// One implementation a kind of device: src/cpu, src/cuda. Tensors are on that device; activations,
/// weights and their gradients are float32 or bfloat16, arithmetic is float32, sums that leave a
/// row are float64. No call communicates; on a GPU every call enqueues on the current stream and
/// returns. Results do not depend on the number of threads or blocks that run: the same bits every
/// time.
class Kernels {
 public:
  virtual ~Kernels() = default;

  /// Throws ModelError where these kernels do not take a model of this shape and width.
  virtual void require(const AttentionShape& shape, int64_t width) const = 0;

  /// y [n, d] = x / sqrt(mean(x²) + eps) · weight, row by row; the reciprocal root goes to rstd [n]
  /// f32. x may be strided by row.
  virtual at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                              at::Tensor& rstd) const = 0;
  /// dx += the input gradient of rms_norm, and the weight gradient of every objective whose rows
  /// are [row_segments[k], row_segments[k+1]). dy, x, dx [n, d] may be strided by row.
  virtual void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                                 Parameter& weight, const std::vector<int64_t>& row_segments,
                                 at::Tensor& dx) const = 0;

  /// x [T, heads, d] <- rotated in place, halves paired as in Hugging Face checkpoints: (x_i,
  /// x_{i+d/2}); positions [T] i64; cos, sin [positions, d/2] f32. Heads lie side by side; tokens
  /// may be strided. `inverse`: the transposed rotation, which is the backward.
  virtual void rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos,
                      const at::Tensor& sin, bool inverse) const = 0;

  /// act [T, F] = silu(gate) · up, for gate_up [T, 2F] = [gate | up].
  virtual at::Tensor swiglu(const at::Tensor& gate_up) const = 0;
  /// dgate_up [T, 2F] and, recomputed in the same sweep, act [T, F], from dact [T, F].
  virtual void swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up,
                               at::Tensor& dgate_up, at::Tensor& act) const = 0;

  /// x [T, d] with each element zeroed with probability p, else scaled by 1 / (1 - p). The draw of
  /// an element depends on (its token's key in batch.dropout_keys, `site`, its position, its
  /// feature) alone: the same on any layout and device, and again in the backward.
  virtual at::Tensor dropout(const at::Tensor& x, const PackedBatch& batch, double p,
                             uint64_t site) const = 0;

  /// Causal attention of every packed sequence with itself (and, for probes, with the sequence it
  /// continues). qkv [T, (heads + 2 kv_heads) d]; out [T, heads d]. `saved` receives what the
  /// backward needs.
  virtual at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape,
                               const PackedBatch& batch, std::vector<at::Tensor>& saved) const = 0;
  /// dqkv [T, (heads + 2 kv_heads) d] from dout [T, heads d].
  virtual at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                        const at::Tensor& out, const std::vector<at::Tensor>& saved,
                                        const AttentionShape& shape,
                                        const PackedBatch& batch) const = 0;

  /// table [V, D] += g [n, D] at `rows` [n] i64 in [0, V), which may repeat: in order, so with the
  /// same bits every time.
  virtual void add_rows(at::Tensor& table, const at::Tensor& rows, const at::Tensor& g) const = 0;

  /// sums [n] f64 += scale · Σ_j a[i, j] b[i, j]; products and sums in float64. a, b [n, d] of one
  /// type may be strided by row.
  virtual void add_row_products(const at::Tensor& a, const at::Tensor& b, double scale,
                                at::Tensor sums) const = 0;

  /// Scored positions whose logits exist at a time.
  virtual int64_t head_chunk() const = 0;
  /// [n, V] = h [n, D] Wᵀ, in the type that the row losses below read.
  virtual at::Tensor logits(const at::Tensor& h, const at::Tensor& weight) const = 0;
  /// loss [1] f64 += Σ rows −log softmax(logits)[target]; logits [n, V] <- softmax(logits) −
  /// onehot(target), the gradient of that sum. targets [n] i64 in [0, V).
  virtual void cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets,
                                  at::Tensor& loss) const = 0;
  /// loss [1] f64 += Σ rows KL(p_ref ‖ p) = Σ p_ref (log p_ref − log p); logits [n, V] <- p −
  /// p_ref, the gradient of that sum. reference [n, V] is overwritten.
  virtual void kl_rows(at::Tensor& logits, at::Tensor& reference, at::Tensor& loss) const = 0;

  /// gram [K, K] f64 += [g_i·g_j] of K gradients [S] f32; products and sums in float64 in a fixed
  /// order.
  virtual void add_inner_products(const std::vector<at::Tensor>& gradients,
                                  at::Tensor gram) const = 0;
  /// One sweep over the ranges of a shard: g = Σ c_k g_k, then AdamW on master, m and v, and
  /// `compute` follows master. `coefficients` hold the rule's coefficients times the clip factor,
  /// divided by the objectives' token counts.
  virtual void update(const std::vector<at::Tensor>& gradients,
                      const std::vector<double>& coefficients, const AdamW& adamw,
                      const std::vector<UpdateRange>& ranges, const ShardState& shard) const = 0;
};

}  // namespace safegrad
