// any_order.h: what tests of the CUDA kernels share: the kernels under the emulation, in every
// order of threads and blocks.
#pragma once
#include <cstring>
#include <vector>

#include <ATen/ATen.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "cpu/cpu_kernels.h"
#include "cuda/cuda_kernels.h"
#include "unit/numbers.h"

namespace safegrad::test {

/// CudaKernels on the emulation, whose only stream is the null stream. Attention on a GPU is
/// LibTorch's, which is not emulated: the CPU's stands in.
class EmulatedKernels final : public cuda::CudaKernels {
 public:
  EmulatedKernels() : CudaKernels([] { return nullptr; }) {}
  at::Tensor attention(const at::Tensor& qkv, const AttentionShape& shape, const PackedBatch& batch,
                       std::vector<at::Tensor>& saved) const override {
    return cpu_kernels().attention(qkv, shape, batch, saved);
  }
  at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& qkv,
                                const at::Tensor& out, const std::vector<at::Tensor>& saved,
                                const AttentionShape& shape,
                                const PackedBatch& batch) const override {
    return cpu_kernels().attention_backward(dout, qkv, out, saved, shape, batch);
  }
};

inline const Kernels& kernels() {
  static const EmulatedKernels instance;
  return instance;
}

/// The very bits, NaN included.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  if (x.sizes() != y.sizes() || x.scalar_type() != y.scalar_type()) return false;
  return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

/// run() -> tensors that it made. Runs it with threads and blocks in three orders, expects the same
/// bits of each, and returns them.
template <typename Run>
std::vector<at::Tensor> in_any_order(const Run& run) {
  using emulation::Order;
  const std::vector<at::Tensor> forward = run();
  for (auto [threads, blocks] :
       {std::pair(Order::reversed, Order::reversed), {Order::shuffled, Order::shuffled}}) {
    emulation::set_order(threads, blocks);
    const std::vector<at::Tensor> other = run();
    emulation::set_order(Order::forward, Order::forward);
    for (size_t i = 0; i < forward.size(); ++i) {
      EXPECT_TRUE(same_bits(forward[i], other[i])) << "result " << i << " depends on the order";
    }
  }
  return forward;
}

/// |actual - expected| <= relative |expected| + absolute · scale, for every element; a NaN is a
/// failure. Without a scale it is 1.
inline void expect_within(const at::Tensor& actual, const at::Tensor& expected, double relative,
                          double absolute, const at::Tensor& scale = {}) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const Values got = values_of(actual), wanted = values_of(expected);
  const Values scales = scale.defined() ? values_of(scale) : Values(got.size(), 1.0);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::abs(got[i] - wanted[i]), relative * std::abs(wanted[i]) + absolute * scales[i])
        << "element " << i << ": " << got[i] << ", expected " << wanted[i];
  }
}

/// n whole numbers of [low, high).
inline at::Tensor random_integers(int64_t n, int64_t low, int64_t high, uint64_t seed) {
  std::mt19937_64 bits(seed);
  std::uniform_int_distribution<int64_t> uniform(low, high - 1);
  std::vector<int64_t> values;
  for (int64_t i = 0; i < n; ++i) values.push_back(uniform(bits));
  return indices(values);
}

/// A result in this type is rounded once: relative error of that.
inline double rounding(at::ScalarType type) {
  return type == at::kBFloat16 ? 0x1p-8 : 0x1p-24;
}

inline at::Tensor random_of(at::ScalarType type, at::IntArrayRef shape, uint64_t seed,
                            double scale = 1.0) {
  return (random_tensor(shape, seed) * scale).to(type);
}

/// A view of x's values whose rows are 16-byte aligned but not adjacent.
inline at::Tensor strided_aligned(const at::Tensor& x) {
  at::Tensor wide = at::full({x.size(0), x.size(1) + 24}, 7.0, x.options());
  at::Tensor view = wide.narrow(1, 8, x.size(1));
  view.copy_(x);
  return view;
}

/// The same values at an address that is not a multiple of 16 bytes.
inline at::Tensor misaligned(const at::Tensor& x) {
  at::Tensor view = at::full({x.numel() + 1}, 7.0, x.options()).narrow(0, 1, x.numel());
  view.copy_(x.reshape({-1}));
  return view.view(x.sizes());
}

inline const at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

}  // namespace safegrad::test
