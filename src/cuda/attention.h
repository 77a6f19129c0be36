// attention.h: packed attention on a GPU, all sequences in one kernel.
#pragma once
#include "cuda/cuda_kernels.h"

namespace safegrad::cuda {

/// The GPU's kernels, complete: attention through LibTorch's variable-length kernels, without
/// padding and without a loop over sequences. bfloat16 runs FlashAttention, which knows grouped
/// heads; float32 runs the memory-efficient kernel, for which keys and values are repeated. The
/// backward is deterministic.
class DeviceKernels final : public CudaKernels {
 public:
  using CudaKernels::CudaKernels;
  void require(const AttentionShape& shape, int64_t width) const override;
  at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape, const PackedBatch& batch,
                       std::vector<at::Tensor>& saved) const override;
  at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                const at::Tensor& out, const std::vector<at::Tensor>& saved,
                                const AttentionShape& shape,
                                const PackedBatch& batch) const override;
};

}  // namespace safegrad::cuda
