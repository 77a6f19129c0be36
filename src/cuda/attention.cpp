#include "cuda/attention.h"

#include <algorithm>
#include <array>
#include <tuple>

#include <ATen/ATen.h>

#include "core/gpu_limits.h"

namespace safegrad::cuda {
namespace {

// Causal from the lower right corner: a query sees every key up to its own, also where it continues
// another sequence and has more keys than queries.
constexpr int64_t kCausalFromBottomRight = 2;

struct Heads {
  at::Tensor q, k, v;  // [T, heads, d] views of the packed tensor
};

Heads split(const at::Tensor& qkv, const AttentionShape& s) {
  const int64_t tokens = qkv.size(0);
  auto part = [&](int64_t first, int64_t heads) {
    return qkv.narrow(1, first * s.head_dim, heads * s.head_dim).view({tokens, heads, s.head_dim});
  };
  return {part(0, s.heads), part(s.heads, s.kv_heads), part(s.heads + s.kv_heads, s.kv_heads)};
}

// Which keys the sequences see: their own, or (probes) those of the sequence that they continue and
// then their own. rows: undefined where the keys are the packed ones as they lie.
struct KeySpans {
  at::Tensor rows, boundaries;
  int64_t longest;
};

KeySpans key_spans(const PackedBatch& batch) {
  if (batch.parents.empty()) return {{}, batch.boundaries, batch.longest};
  std::vector<int64_t> rows;
  std::vector<int32_t> boundaries = {0};
  KeySpans spans{{}, {}, 0};
  auto push = [&](size_t sequence) {
    for (int64_t t = batch.cu_seqlens[sequence]; t < batch.cu_seqlens[sequence + 1]; ++t)
      rows.push_back(t);
  };
  for (size_t n = 0; n < batch.parents.size(); ++n) {
    if (batch.parents[n] >= 0) push(static_cast<size_t>(batch.parents[n]));
    push(n);
    const auto end = static_cast<int32_t>(rows.size());
    spans.longest = std::max<int64_t>(spans.longest, end - boundaries.back());
    boundaries.push_back(end);
  }
  const at::Device device = batch.tokens.device();
  spans.rows = at::tensor(at::ArrayRef<int64_t>(rows), at::kLong).to(device);
  spans.boundaries = at::tensor(at::ArrayRef<int32_t>(boundaries), at::kInt).to(device);
  return spans;
}

// [T, kv, d] -> [1, T, kv * group, d]: the memory-efficient kernel does not know groups.
at::Tensor repeat_groups(const at::Tensor& x, int64_t group) {
  const int64_t tokens = x.size(0), kv = x.size(1), d = x.size(2);
  return x.unsqueeze(2).expand({tokens, kv, group, d}).reshape({1, tokens, kv * group, d});
}

// For a while, kernels that add in any order take their slower, ordered way. LibTorch's switch is
// the process's.
class InFixedOrder {
 public:
  InFixedOrder() : before_(at::globalContext().deterministicAlgorithms()) {
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  }
  ~InFixedOrder() { at::globalContext().setDeterministicAlgorithms(before_, false); }
  InFixedOrder(const InFixedOrder&) = delete;
  InFixedOrder& operator=(const InFixedOrder&) = delete;

 private:
  bool before_;
};

}  // namespace

void DeviceKernels::require(const AttentionShape& shape, int64_t width) const {
  CudaKernels::require(shape, width);
  require_gpu_attention(shape.head_dim);
}

at::Tensor DeviceKernels::attention(const at::Tensor& qkv, const AttentionShape& shape,
                                    const PackedBatch& batch,
                                    std::vector<at::Tensor>& saved) const {
  const int64_t tokens = qkv.size(0);
  saved.clear();
  if (tokens == 0) return at::empty({0, shape.heads * shape.head_dim}, qkv.options());
  Heads x = split(qkv, shape);
  const KeySpans keys = key_spans(batch);
  if (keys.rows.defined()) {
    x.k = x.k.index_select(0, keys.rows);
    x.v = x.v.index_select(0, keys.rows);
  }
  if (qkv.scalar_type() == at::kBFloat16) {
    auto [out, lse, rng_state, unused, mask] = at::_flash_attention_forward(
        x.q, x.k, x.v, batch.boundaries, keys.boundaries, batch.longest, keys.longest,
        /*dropout_p=*/0.0, /*is_causal=*/true, /*return_debug_mask=*/false);
    saved = {lse, rng_state, unused};
    return out.view({tokens, shape.heads * shape.head_dim});
  }
  const int64_t group = shape.heads / shape.kv_heads;
  auto [out, lse, seed, offset, longest_q, longest_k] = at::_efficient_attention_forward(
      x.q.unsqueeze(0), repeat_groups(x.k, group), repeat_groups(x.v, group), /*bias=*/{},
      batch.boundaries, keys.boundaries, batch.longest, keys.longest, /*dropout_p=*/0.0,
      kCausalFromBottomRight, /*compute_log_sumexp=*/true);
  saved = {lse, seed, offset};
  return out.reshape({tokens, shape.heads * shape.head_dim});
}

at::Tensor DeviceKernels::attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                             const at::Tensor& out,
                                             const std::vector<at::Tensor>& saved,
                                             const AttentionShape& shape,
                                             const PackedBatch& batch) const {
  const int64_t tokens = qkv.size(0), group = shape.heads / shape.kv_heads;
  at::Tensor dqkv = at::empty_like(qkv);
  if (tokens == 0) return dqkv;
  const Heads x = split(qkv, shape);
  const Heads dx = split(dqkv, shape);
  const std::array<int64_t, 3> by_head = {tokens, shape.heads, shape.head_dim};
  const InFixedOrder ordered;
  if (qkv.scalar_type() == at::kBFloat16) {
    const auto [dq, dk, dv] = at::_flash_attention_backward(
        dout.view(by_head), x.q, x.k, x.v, out.view(by_head), saved[0], batch.boundaries,
        batch.boundaries, batch.longest, batch.longest, /*dropout_p=*/0.0, /*is_causal=*/true,
        saved[1], saved[2]);
    dx.q.copy_(dq);
    dx.k.copy_(dk);
    dx.v.copy_(dv);
    return dqkv;
  }
  const auto [dq, dk, dv, dbias] = at::_efficient_attention_backward(
      dout.view(by_head).unsqueeze(0), x.q.unsqueeze(0), repeat_groups(x.k, group),
      repeat_groups(x.v, group), /*bias=*/{}, out.view(by_head).unsqueeze(0), batch.boundaries,
      batch.boundaries, batch.longest, batch.longest, saved[0], /*dropout_p=*/0.0, saved[1],
      saved[2], kCausalFromBottomRight, /*bias_requires_grad=*/false);
  auto sum_groups = [&](const at::Tensor& g) {
    return g.view({tokens, shape.kv_heads, group, shape.head_dim}).sum(2);
  };
  dx.q.copy_(dq.squeeze(0));
  dx.k.copy_(sum_groups(dk));
  dx.v.copy_(sum_groups(dv));
  return dqkv;
}

}  // namespace safegrad::cuda
