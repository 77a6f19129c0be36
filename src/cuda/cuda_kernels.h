// cuda_kernels.h: the kernels on an NVIDIA GPU, all but attention.
#pragma once
#include <functional>

#include "core/kernels.h"

struct CUstream_st;

namespace safegrad::cuda {

/// See Kernels. Calls enqueue on `current_stream()`, asked at every call, and return; outputs and
/// scratch come from LibTorch's allocator for the device of the inputs. logits() stay in the type
/// of h, bf16 included: the row losses read them as float and write the gradient in their place.
/// Norms are at most 8192 wide. Throws UsageError for a tensor that a kernel could not read as it
/// is (type, shape, strides), RunError if a launch is refused. Attention is left to a derived
/// class.
class CudaKernels : public Kernels {
 public:
  explicit CudaKernels(std::function<CUstream_st*()> current_stream)
      : current_stream_(std::move(current_stream)) {}

  void require(const AttentionShape& shape, int64_t width) const override;
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

 protected:
  CUstream_st* stream() const { return current_stream_(); }

 private:
  std::function<CUstream_st*()> current_stream_;
};

}  // namespace safegrad::cuda
