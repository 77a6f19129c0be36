// cpu_kernels.h: the kernels as loops over LibTorch's threads, vectorised by the compiler.
#pragma once
#include "core/kernels.h"

namespace safegrad {

/// See Kernels. The bodies are in layers.cpp, attention.cpp, loss_rows.cpp and update.cpp. logits()
/// are float32; attention runs a sequence at a time.
class CpuKernels final : public Kernels {
 public:
  void require(const AttentionShape&, int64_t) const override {}
  at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                      at::Tensor& rstd) const override;
  void rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& rstd,
                         Parameter& weight, const std::vector<int64_t>& row_segments,
                         at::Tensor& dx) const override;
  void rotate(at::Tensor x, const at::Tensor& positions, const at::Tensor& cos,
              const at::Tensor& sin, bool inverse) const override;
  at::Tensor swiglu(const at::Tensor& gate_up) const override;
  void swiglu_backward(const at::Tensor& dact, const at::Tensor& gate_up, at::Tensor& dgate_up,
                       at::Tensor& act) const override;
  at::Tensor dropout(const at::Tensor& x, const PackedBatch& batch, double p,
                     uint64_t site) const override;
  at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape, const PackedBatch& batch,
                       std::vector<at::Tensor>& saved) const override;
  at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                const at::Tensor& out, const std::vector<at::Tensor>& saved,
                                const AttentionShape& shape,
                                const PackedBatch& batch) const override;
  void add_rows(at::Tensor& table, const at::Tensor& rows, const at::Tensor& g) const override;
  void add_row_products(const at::Tensor& a, const at::Tensor& b, double scale,
                        at::Tensor sums) const override;
  int64_t head_chunk() const override;
  at::Tensor logits(const at::Tensor& h, const at::Tensor& weight) const override;
  void cross_entropy_rows(at::Tensor& logits, const at::Tensor& targets,
                          at::Tensor& loss) const override;
  void kl_rows(at::Tensor& logits, at::Tensor& reference, at::Tensor& loss) const override;
  void add_inner_products(const std::vector<at::Tensor>& gradients, at::Tensor gram) const override;
  void update(const std::vector<at::Tensor>& gradients, const std::vector<double>& coefficients,
              const AdamW& adamw, const std::vector<UpdateRange>& ranges,
              const ShardState& shard) const override;
};

/// The one instance; it has no state.
const Kernels& cpu_kernels();

}  // namespace safegrad
