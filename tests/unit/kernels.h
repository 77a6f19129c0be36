// kernels.h: the CPU's kernels as free functions that return what tests compare.
#pragma once
#include <vector>

#include <ATen/ATen.h>

#include "core/head_loss.h"
#include "core/surgery.h"
#include "cpu/cpu_kernels.h"

namespace safegrad::test {

inline at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                           at::Tensor& rstd) {
  return cpu_kernels().rms_norm(x, weight, eps, rstd);
}

inline void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                              Parameter& weight, const std::vector<int64_t>& row_segments,
                              at::Tensor& dx) {
  cpu_kernels().rms_norm_backward(dy, x, rstd, weight, row_segments, dx);
}

inline void rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos,
                   const at::Tensor& sin, bool inverse) {
  cpu_kernels().rotate(std::move(x), positions, cos, sin, inverse);
}

inline at::Tensor swiglu(const at::Tensor& gate_up) {
  return cpu_kernels().swiglu(gate_up);
}

inline void swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up, at::Tensor& dgate_up,
                            at::Tensor& act) {
  cpu_kernels().swiglu_backward(dact, gate_up, dgate_up, act);
}

inline at::Tensor dropout(const at::Tensor& x, const PackedBatch& batch, double p, uint64_t site) {
  return cpu_kernels().dropout(x, batch, p, site);
}

inline at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape,
                            const PackedBatch& batch, std::vector<at::Tensor>& saved) {
  return cpu_kernels().attention(qkv, shape, batch, saved);
}

inline at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                     const at::Tensor& out, const std::vector<at::Tensor>& saved,
                                     const AttentionShape& shape, const PackedBatch& batch) {
  return cpu_kernels().attention_backward(dout, qkv, out, saved, shape, batch);
}

/// What `add(loss)` adds to a loss of 0.
template <typename Add>
double loss_of(const Add& add) {
  at::Tensor loss = at::zeros({1}, at::kDouble);
  add(loss);
  return loss.item<double>();
}

inline double cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets) {
  return loss_of(
      [&](at::Tensor& loss) { cpu_kernels().cross_entropy_rows(logits, targets, loss); });
}

inline double kl_rows(at::Tensor& logits, at::Tensor& reference) {
  return loss_of([&](at::Tensor& loss) { cpu_kernels().kl_rows(logits, reference, loss); });
}

inline double cross_entropy_head(const at::Tensor& h, const at::Tensor& targets, Parameter& weight,
                                 size_t k, const at::Tensor& dh) {
  return loss_of([&](at::Tensor& loss) {
    safegrad::cross_entropy_head(cpu_kernels(), h, targets, weight, k, dh, loss);
  });
}

inline double kl_head(const at::Tensor& h, const at::Tensor& h_ref, Parameter& weight,
                      const at::Tensor& reference_weight, size_t k, const at::Tensor& dh) {
  return loss_of([&](at::Tensor& loss) {
    safegrad::kl_head(cpu_kernels(), h, h_ref, weight, reference_weight, k, dh, loss);
  });
}

inline void add_inner_products(const std::vector<at::Tensor>& gradients, Gram& gram) {
  const auto k = static_cast<int64_t>(gram.size);
  cpu_kernels().add_inner_products(gradients,
                                   at::from_blob(gram.values.data(), {k, k}, at::kDouble));
}

}  // namespace safegrad::test
