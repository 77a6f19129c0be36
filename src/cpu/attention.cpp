// attention.cpp: packed causal attention on the CPU, a sequence at a time through LibTorch's flash
// kernel.
#include <cmath>

#include <ATen/ATen.h>

#include "cpu/cpu_kernels.h"

namespace safegrad {
namespace {

struct Heads {
  at::Tensor q, k, v;  // [1, heads, L, d]; k and v repeated for every query head of their group
};

// `rows` of a packed [T, (heads + 2 kv) d] tensor, split by kind into [L, heads, d] views.
at::Tensor part(const at::Tensor& packed, const AttentionShape& s, int64_t begin, int64_t length,
                int64_t first_head, int64_t heads) {
  return packed.narrow(0, begin, length)
      .narrow(1, first_head * s.head_dim, heads * s.head_dim)
      .view({length, heads, s.head_dim});
}

// [L, kv, d] -> [1, kv * group, L, d]. The flash kernel does not know groups, so keys and values
// are repeated.
at::Tensor repeat_groups(const at::Tensor& x, int64_t group) {
  const int64_t length = x.size(0), kv = x.size(1), d = x.size(2);
  return x.permute({1, 0, 2})
      .unsqueeze(1)
      .expand({kv, group, length, d})
      .reshape({1, kv * group, length, d});
}

Heads heads_of(const at::Tensor& qkv, const AttentionShape& s, int64_t begin, int64_t length) {
  const int64_t group = s.heads / s.kv_heads;
  return {part(qkv, s, begin, length, 0, s.heads).permute({1, 0, 2}).unsqueeze(0),
          repeat_groups(part(qkv, s, begin, length, s.heads, s.kv_heads), group),
          repeat_groups(part(qkv, s, begin, length, s.heads + s.kv_heads, s.kv_heads), group)};
}

// A sequence that continues another attends to all of its parent and, causally, to itself.
at::Tensor continued(const Heads& own, const Heads& parent, int64_t head_dim) {
  const at::Tensor k = at::cat({parent.k, own.k}, 2), v = at::cat({parent.v, own.v}, 2);
  const int64_t length = own.k.size(2), before = parent.k.size(2);
  at::Tensor scores = at::matmul(own.q, k.transpose(2, 3)).to(at::kFloat);
  scores.mul_(1.0 / std::sqrt(static_cast<double>(head_dim)));
  const at::Tensor future =
      at::ones({length, before + length}, scores.options().dtype(at::kBool)).triu(before + 1);
  scores.masked_fill_(future, -INFINITY);
  return at::matmul(scores.softmax(-1).to(v.scalar_type()), v);
}

}  // namespace

at::Tensor CpuKernels::attention(const at::Tensor& qkv, const AttentionShape& shape,
                                 const PackedBatch& batch, std::vector<at::Tensor>& saved) const {
  at::Tensor out = at::empty({qkv.size(0), shape.heads * shape.head_dim}, qkv.options());
  saved.clear();
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const auto i = static_cast<size_t>(n);
    const int64_t begin = batch.cu_seqlens[i], length = batch.cu_seqlens[i + 1] - begin;
    const Heads own = heads_of(qkv, shape, begin, length);
    at::Tensor result;
    if (!batch.parents.empty() && batch.parents[i] >= 0) {
      const auto p = static_cast<size_t>(batch.parents[i]);
      const int64_t start = batch.cu_seqlens[p];
      result = continued(own, heads_of(qkv, shape, start, batch.cu_seqlens[p + 1] - start),
                         shape.head_dim);
      saved.emplace_back();
    } else {
      at::Tensor sequence_lse;
      std::tie(result, sequence_lse) = at::_scaled_dot_product_flash_attention_for_cpu(
          own.q, own.k, own.v, 0.0, /*is_causal=*/true);
      saved.push_back(std::move(sequence_lse));
    }
    out.narrow(0, begin, length)
        .view({length, shape.heads, shape.head_dim})
        .copy_(result.squeeze(0).transpose(0, 1));
  }
  return out;
}

at::Tensor CpuKernels::attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                          const at::Tensor& out,
                                          const std::vector<at::Tensor>& saved,
                                          const AttentionShape& shape,
                                          const PackedBatch& batch) const {
  const int64_t group = shape.heads / shape.kv_heads;
  at::Tensor dqkv = at::empty_like(qkv);
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const auto i = static_cast<size_t>(n);
    const int64_t begin = batch.cu_seqlens[i], length = batch.cu_seqlens[i + 1] - begin;
    const Heads own = heads_of(qkv, shape, begin, length);
    auto sequence = [&](const at::Tensor& x) {
      return part(x, shape, begin, length, 0, shape.heads).permute({1, 0, 2}).unsqueeze(0);
    };
    const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        sequence(dout), own.q, own.k, own.v, sequence(out), saved[i], 0.0, /*is_causal=*/true);
    // [1, kv * group, L, d] -> [L, kv, d]: the gradient of a repeated key is the sum over its
    // group.
    auto sum_groups = [&](const at::Tensor& g) {
      return g.view({shape.kv_heads, group, length, shape.head_dim}).sum(1).transpose(0, 1);
    };
    part(dqkv, shape, begin, length, 0, shape.heads).copy_(dq.squeeze(0).transpose(0, 1));
    part(dqkv, shape, begin, length, shape.heads, shape.kv_heads).copy_(sum_groups(dk));
    part(dqkv, shape, begin, length, shape.heads + shape.kv_heads, shape.kv_heads)
        .copy_(sum_groups(dv));
  }
  return dqkv;
}

}  // namespace safegrad
